//! Where an object, a list or a string ends, by its brackets and quotes alone.

use memchr::memchr3;

/// The end of the object or list that begins at `from`; `Err` where it cannot go on.
pub(super) fn value_end(bytes: &[u8], from: usize, newline: u8) -> Result<usize, usize> {
    scan(bytes, from, Some(newline))
}

/// As deep as the parser goes; it also bounds the bits below.
const DEEPEST: u32 = 126;

/// As [`value_end`]; without `newline`, strings may go over several lines, and words that no JSON holds end the search.
pub(super) fn scan(bytes: &[u8], from: usize, newline: Option<u8>) -> Result<usize, usize> {
    // A bit for each open bracket, the innermost lowest: whether it is an object's.
    let (mut at, mut depth, mut objects, mut before) = (from, 0, 0u128, 0);
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' => {
                at = string_end(bytes, at + 1, newline)?;
                before = byte;
                continue;
            }
            b'{' | b'[' => {
                let fits = match (depth, objects & 1) {
                    (0, _) => true,
                    (_, 0) => matches!(before, b'[' | b','),
                    _ => before == b':',
                };
                if !fits || depth == DEEPEST {
                    return Err(at);
                }
                depth += 1;
                objects = objects << 1 | u128::from(byte == b'{');
            }
            b'}' | b']' => {
                if (objects & 1 == 1) != (byte == b'}') {
                    return Err(at);
                }
                depth -= 1;
                objects >>= 1;
                if depth == 0 {
                    return Ok(at + 1);
                }
            }
            b' ' | b'\n' | b'\r' | b'\t' => {
                at += 1;
                continue;
            }
            // The first letters of true, false and null, and of what Python and JavaScript write.
            _ if newline.is_none() && (byte.is_ascii_alphabetic() || byte >= 0x80) => {
                let word = bytes[at..].iter().take_while(|byte| byte.is_ascii_alphabetic()).count();
                if !WORDS.contains(&&bytes[at..at + word]) {
                    return Err(at);
                }
                at += word;
                before = byte;
                continue;
            }
            _ => {}
        }
        before = byte;
        at += 1;
    }
    Err(at)
}

const WORDS: [&[u8]; 9] = [b"true", b"false", b"null", b"NaN", b"Infinity", b"None", b"True", b"False", b"undefined"];

/// The end of the string whose text begins at `at`.
pub(super) fn string_end(bytes: &[u8], mut at: usize, newline: Option<u8>) -> Result<usize, usize> {
    let line_end = newline.unwrap_or(b'"');
    loop {
        let Some(found) = bytes.get(at..).and_then(|rest| memchr3(b'"', b'\\', line_end, rest)) else {
            return Err(bytes.len());
        };
        at += found;
        match bytes[at] {
            b'"' => return Ok(at + 1),
            b'\\' if newline.is_none() || bytes.get(at + 1) != newline.as_ref() => at += 2,
            _ => return Err(at),
        }
    }
}
