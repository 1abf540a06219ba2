//! Where each row of a data file begins and ends. Brackets and quotes decide; each row is parsed by itself later.
//!
//! One fault costs one row wherever it is clear where the next row begins: on a line of its own in JSON lines, and in
//! an array at the next line that begins as the lines of its rows do. Where it is not clear the file is at fault.

use std::collections::BTreeMap;
use std::ops::Range;

use memchr::{memchr, memchr_iter};

use super::brackets::{scan, string_end, value_end};

use super::reason::Reason;

/// The rows of a file, and what was found between them.
#[derive(Debug, Default)]
pub(super) struct Split {
    /// The bytes of each row and its line.
    pub(super) rows: Vec<(Range<usize>, u32)>,
    /// Rows that are missing, by their number: a comma stands where they should.
    pub(super) missing: BTreeMap<usize, Reason>,
    /// The line and the reason why the reading ended before the end of the file.
    pub(super) broken: Option<(u32, Reason)>,
    /// What was read though it is not quite as it should be: the first line and what it is.
    pub(super) notes: Vec<(u32, Reason)>,
}

/// Splits the content of a file whose first row or array begins at `start`.
pub(super) fn split(bytes: &[u8], start: usize) -> Split {
    let newline = if memchr(b'\n', bytes).is_some() { b'\n' } else { b'\r' };
    let line = 1 + memchr_iter(newline, &bytes[..start]).count() as u32;
    let mut splitter = Splitter { bytes, at: start, line, newline, ..Splitter::default() };
    splitter.run(bytes.get(start) == Some(&b'['));
    let mut split = splitter.split;
    split.notes = splitter.noted.into_iter().flatten().map(|noted| noted.told()).collect();
    split
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What is read though it is not quite as it should be.
#[derive(Clone, Copy)]
enum Oddity {
    Mark,
    Glued,
    NoComma,
    Arrays,
    BareReturns,
}

/// How often an oddity was met, and the line of the first.
#[derive(Clone, Copy)]
struct Noted {
    what: Oddity,
    line: u32,
    n: usize,
}

impl Noted {
    fn told(self) -> (u32, Reason) {
        let n = self.n;
        let (what, hint) = match self.what {
            Oddity::Mark => (
                format!("a byte-order mark stands within the file ({n} in all, this is the first); it is passed over"),
                "files that begin with one were joined: remove it, sed -i 's/\\xEF\\xBB\\xBF//g' FILE",
            ),
            Oddity::Glued => (
                format!(
                    "several rows stand on one line ({n} rows follow another one so, this is the first line); each is read"
                ),
                "a line break is missing between files that were joined: jq -c . FILE writes one row a line",
            ),
            Oddity::NoComma => (
                format!("no comma stands before a row of the array ({n} in all, this is the first); each row is read"),
                "write a comma between two rows",
            ),
            Oddity::Arrays => (
                format!(
                    "another array or row begins after the end of an array ({n} in all, this is the first); all are read"
                ),
                "a file is one array, or one object a line: jq -c 'if type == \"array\" then .[] else . end' FILE",
            ),
            Oddity::BareReturns => (
                "the lines end in a carriage return alone, as on old Macs; each is read as a line".to_owned(),
                "tr '\\r' '\\n' < FILE writes lines as they are today",
            ),
        };
        (self.line, Reason::new(what).hint(hint))
    }
}

/// What stands before a place in an array.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    /// The array's bracket or a comma.
    Comma,
    /// A row.
    Row,
    /// A row that does not end, and maybe its comma.
    Unclosed,
}

#[derive(Default)]
struct Splitter<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The line of `at`.
    line: u32,
    /// What ends a line.
    newline: u8,
    split: Split,
    noted: [Option<Noted>; 5],
    /// Bytes that were looked through in vain.
    wasted: usize,
}

impl Splitter<'_> {
    fn run(&mut self, is_array: bool) {
        // Whether what was read last is an array.
        let mut last: Option<bool> = None;
        loop {
            self.skip_space();
            let Some(&byte) = self.bytes.get(self.at) else { break };
            if byte == b'[' && (is_array || self.array_begins(self.at)) {
                if last.is_some() {
                    self.note(Oddity::Arrays);
                }
                last = Some(true);
                if !self.array() {
                    return;
                }
            } else if is_array && byte != b'{' {
                let reason = Reason::new("there is more after the array's closing bracket: what follows is not read");
                let hint = "a data file is one array, or one object a line";
                self.split.broken = Some((self.line, reason.hint(hint)));
                return;
            } else {
                if last == Some(true) {
                    self.note(Oddity::Arrays);
                }
                last = Some(false);
                self.line_rows();
            }
        }
        if self.newline == b'\r' && memchr(b'\r', self.bytes).is_some() && self.split.rows.len() > 1 {
            let line = self.split.rows[0].1;
            self.noted[Oddity::BareReturns as usize] = Some(Noted { what: Oddity::BareReturns, line, n: 1 });
        }
    }

    fn note(&mut self, what: Oddity) {
        let line = self.line;
        self.noted[what as usize].get_or_insert(Noted { what, line, n: 0 }).n += 1;
    }

    /// Goes to a place further on.
    fn go_to(&mut self, at: usize) {
        self.line += memchr_iter(self.newline, &self.bytes[self.at..at]).count() as u32;
        self.at = at;
    }

    fn skip_space(&mut self) {
        loop {
            let rest = &self.bytes[self.at..];
            let space = rest.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            self.go_to(self.at + space);
            if !self.bytes[self.at..].starts_with(BYTE_ORDER_MARK) {
                return;
            }
            self.note(Oddity::Mark);
            self.at += BYTE_ORDER_MARK.len();
        }
    }

    /// Past white space, on one line or over several.
    fn past_space(&self, from: usize, end: usize) -> usize {
        from + self.bytes[from..end].iter().take_while(|byte| byte.is_ascii_whitespace()).count()
    }

    /// Whether an array of rows begins here, and not a row that is no object.
    fn array_begins(&self, at: usize) -> bool {
        let next = self.past_space(at + 1, self.bytes.len());
        let is_on_next_line = memchr(self.newline, &self.bytes[at..next]).is_some();
        is_on_next_line || self.bytes.get(next) == Some(&b'{')
    }

    fn push(&mut self, range: Range<usize>, line: u32) {
        self.split.rows.push((range, line));
    }

    /// Takes the rows of a line of JSON lines: one, where nobody has glued several.
    fn line_rows(&mut self) {
        let end = memchr(self.newline, &self.bytes[self.at..]).map_or(self.bytes.len(), |length| self.at + length);
        let line = &self.bytes[..end];
        let mut from = self.at;
        loop {
            let stop = if line[from] == b'{' { value_end(line, from, self.newline).ok() } else { None };
            let next = stop.map(|stop| self.past_marks(stop, end));
            let after_comma = match next {
                Some(next) if line.get(next) == Some(&b',') => Some(self.past_marks(next + 1, end)),
                _ => next,
            };
            match (stop, next, after_comma) {
                (Some(stop), Some(next), _) if next == end => {
                    self.push(from..stop, self.line);
                    break;
                }
                (Some(stop), _, Some(next)) if line.get(next) == Some(&b'{') => {
                    self.push(from..stop, self.line);
                    self.note(Oddity::Glued);
                    from = next;
                }
                (Some(stop), Some(next), _) if line[next] == b'[' && self.array_begins(next) => {
                    self.push(from..stop, self.line);
                    self.at = next;
                    return;
                }
                _ => {
                    // No text of a row holds a brace and a bare quote: where a row of this kind begins, another one ends.
                    let another = opening(&line[from..]).and_then(|opening| find(&line[from + 1..], opening));
                    let stop = another.map_or(end, |length| from + 1 + length);
                    self.push(from..stop, self.line);
                    if stop == end {
                        break;
                    }
                    from = stop;
                }
            }
        }
        self.at = end;
    }

    /// Past white space and byte-order marks on one line.
    fn past_marks(&mut self, from: usize, end: usize) -> usize {
        let mut at = self.past_space(from, end);
        while self.bytes[at..end].starts_with(BYTE_ORDER_MARK) {
            self.note(Oddity::Mark);
            at = self.past_space(at + BYTE_ORDER_MARK.len(), end);
        }
        at
    }

    /// Takes the rows of the array that begins here; false where the reading ends within it.
    fn array(&mut self) -> bool {
        let first = self.split.rows.len();
        self.at += 1;
        let mut before = Before::Comma;
        loop {
            self.skip_space();
            match self.bytes.get(self.at) {
                None => {
                    let what = "the array is never closed: the file is cut off, or its last `]` is missing";
                    let line = self.split.rows.last().map_or(self.line, |(_, line)| *line);
                    let hint = "fetch or write the file again, or close the array after this row";
                    self.split.broken = Some((line, Reason::new(what).hint(hint)));
                    return false;
                }
                Some(&byte @ (b',' | b']')) => {
                    if before == Before::Comma && (byte == b',' || self.split.rows.len() > first) {
                        let reason = Reason::new(format!("there is no row before this `{}`", char::from(byte)));
                        self.split.missing.insert(self.split.rows.len(), reason.hint("remove the extra comma"));
                        self.push(self.at..self.at + 1, self.line);
                    }
                    before = Before::Comma;
                    self.at += 1;
                    if byte == b']' {
                        return true;
                    }
                }
                Some(b'/' | b'#') => {
                    let end = self.comment_end();
                    self.push(self.at..end, self.line);
                    self.go_to(end);
                }
                Some(_) => {
                    if before == Before::Row {
                        self.note(Oddity::NoComma);
                    }
                    let Some((end, after)) = self.element_end() else {
                        self.split.broken = Some((self.line, self.unclosed()));
                        return false;
                    };
                    before = after;
                    self.push(self.at..end, self.line);
                    self.go_to(end);
                }
            }
        }
    }

    fn comment_end(&self) -> usize {
        let rest = &self.bytes[self.at..];
        let line_end = || memchr(self.newline, rest).unwrap_or(rest.len());
        let length = match rest.starts_with(b"/*") {
            true => memchr::memmem::find(rest, b"*/").map_or_else(line_end, |end| end + 2),
            false => line_end(),
        };
        self.at + length
    }

    /// The end of the row that begins here, with what follows it before the next comma, bracket or row.
    fn element_end(&mut self) -> Option<(usize, Before)> {
        let bytes = self.bytes;
        let found = match bytes[self.at] {
            b'{' | b'[' => value_end(bytes, self.at, self.newline),
            b'"' => string_end(bytes, self.at + 1, Some(self.newline)).and_then(|end| {
                // A key: the row's first bracket is missing.
                let is_key = bytes.get(self.past_space(end, bytes.len())) == Some(&b':');
                if is_key { Err(end) } else { Ok(end) }
            }),
            _ => Ok(self.at),
        };
        let end = match found {
            Ok(end) => end,
            Err(stuck) => {
                self.wasted += stuck - self.at;
                // Many rows that are never closed would each be looked for to the end of the file.
                if self.wasted > (8 * bytes.len()).saturating_add(1 << 20) {
                    return None;
                }
                let over_lines = scan(bytes, self.at, None).ok().filter(|_| bytes[self.at] != b'"');
                let next_row = || self.next_line_of_a_row().or_else(|| self.next_row_on_the_line());
                let unclosed = || next_row().map(|next| (next, Before::Unclosed));
                return over_lines.map(|end| (end, Before::Row)).or_else(unclosed);
            }
        };
        let after = self.past_space(end, bytes.len());
        let end = match bytes.get(after) {
            None | Some(b',' | b']' | b'{' | b'[' | b'/' | b'#') if end > self.at => end,
            _ if bytes[after..].starts_with(BYTE_ORDER_MARK) && end > self.at => end,
            _ => self.rest_end(after),
        };
        Some((end, Before::Row))
    }

    /// The end of what follows a row and is no comma, bracket or row; it ends with its line at the latest.
    fn rest_end(&self, mut at: usize) -> usize {
        while let Some(&byte) = self.bytes.get(at) {
            at = match byte {
                b',' | b']' => return at,
                _ if byte == self.newline => return at,
                b'"' => match string_end(self.bytes, at + 1, Some(self.newline)) {
                    Ok(end) | Err(end) => end,
                },
                _ => at + 1,
            };
        }
        at
    }

    /// Where the next row begins after one that does not end, if that is clear: at the next line that begins as this
    /// row's line does. Each row must have a line, or lines, of its own.
    fn next_line_of_a_row(&self) -> Option<usize> {
        let bytes = self.bytes;
        let line_start = memchr::memrchr(self.newline, &bytes[..self.at]).map_or(0, |at| at + 1);
        let begins_line = |byte: &u8| byte.is_ascii_whitespace() || b",[\xef\xbb\xbf".contains(byte);
        if !bytes[line_start..self.at].iter().all(begins_line) {
            return None;
        }
        let indent = |start: usize| bytes[start..].iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        let (own_indent, own_column) = (indent(line_start), self.at - line_start);
        // Other rows must not be passed over on the way.
        let first = self.split.rows.iter().find_map(|(range, _)| opening(&bytes[range.clone()]));
        let opening = opening(&bytes[self.at..]).or(first).unwrap_or(b"{");
        for newline in memchr_iter(self.newline, &bytes[self.at..]) {
            let start = self.at + newline + 1;
            let first = start + indent(start);
            let is_end = bytes.get(first) == Some(&b']') && self.past_space(first + 1, bytes.len()) == bytes.len();
            let brace = match bytes.get(first) {
                Some(b',') => first + 1 + indent(first + 1),
                _ => first,
            };
            let is_like_this = indent(start) == own_indent || brace - start == own_column;
            let is_row = is_like_this
                && bytes.get(brace) == Some(&b'{')
                && bytes.get(self.past_space(brace + 1, bytes.len())) == Some(&b'"');
            if is_row || is_end {
                let is_alone = count(&bytes[self.at + 1..start], opening) == 0;
                let end = if is_end { first } else { brace };
                // A comma that stands before the next row belongs to it.
                return is_alone.then_some(if brace > first { first } else { end });
            }
        }
        None
    }

    /// Where the next row begins on the line of one that does not end, if that is clear: its brace and first key stand
    /// there, which no text of a row can hold, and nothing before it looks like the end of a row and the next one.
    fn next_row_on_the_line(&self) -> Option<usize> {
        let rest = &self.bytes[self.at + 1..];
        let next = find(rest, opening(&self.bytes[self.at..])?)?;
        let between = &rest[..next];
        let is_other = |brace: usize| {
            let after = between[brace + 1..].trim_ascii_start();
            after.strip_prefix(b",").unwrap_or(after).trim_ascii_start().starts_with(b"{")
        };
        let is_clear = between.trim_ascii_end().ends_with(b",") && !memchr_iter(b'}', between).any(is_other);
        is_clear.then_some(self.at + 1 + next)
    }

    /// Why the reading ends at the row that begins here.
    fn unclosed(&self) -> Reason {
        let first = self.split.rows.first().map_or(self.at, |(range, _)| range.start);
        let unread = opening(&self.bytes[first..]).map_or(0, |opening| count(&self.bytes[self.at + 1..], opening));
        let reason = match unread {
            0 => Reason::new("the array is never closed: the file is cut off, or a quote or bracket is missing"),
            _ => Reason::new(format!(
                "this row is never closed: a quote or bracket is missing, and where the next row begins cannot be told; \
                 at least {unread} rows after it would go unread"
            )),
        };
        reason.hint("mend this row, and have each row begin on a line of its own")
    }
}

/// The brace and the first key of a row, by which rows of its kind are known.
fn opening(row: &[u8]) -> Option<&[u8]> {
    let quote = 1 + row.get(1..)?.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
    if row.first() != Some(&b'{') || row.get(quote) != Some(&b'"') {
        return None;
    }
    let end = memchr(b'"', &row[quote + 1..])?;
    Some(&row[..quote + end + 2]).filter(|opening| opening.len() < 100)
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, needle)
}

fn count(bytes: &[u8], needle: &[u8]) -> usize {
    memchr::memmem::find_iter(bytes, needle).count()
}
