//! Data files as users bring them along: every row is read, or is named as what it is, and none goes missing.

use bellora::data::record::Record;
use bellora::data::rows::RowFile;
use bellora::error::Result;
use serde_json::{Value, json};

/// What reading a file found.
#[derive(Debug)]
struct Read {
    /// The line of each row, and its answer or what is wrong with it.
    rows: Vec<(u32, std::result::Result<String, String>)>,
    broken: Option<(u32, String)>,
    notes: Vec<(u32, String)>,
}

impl Read {
    fn n_good(&self) -> usize {
        self.rows.iter().filter(|(_, row)| row.is_ok()).count()
    }

    /// The line and the fault of the only bad row.
    #[track_caller]
    fn bad(&self) -> (u32, &str) {
        let mut bad = self.rows.iter().filter_map(|(line, row)| Some((*line, row.as_ref().err()?.as_str())));
        let (first, rest) = (bad.next(), bad.count());
        assert_eq!((rest, &self.broken), (0, &None), "{self:?}");
        first.unwrap_or_else(|| panic!("no bad row: {self:?}"))
    }
}

fn open(name: &str, content: &[u8]) -> Result<RowFile> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    RowFile::read(&path)
}

fn read(content: impl AsRef<[u8]>) -> Read {
    let file = open("rows", content.as_ref()).unwrap_or_else(|error| panic!("{error}"));
    let said = |row| file.record(row).map(|record| record.answer).map_err(|reason| reason.what);
    let told = |(line, reason): &(u32, bellora::data::reason::Reason)| (*line, reason.what.clone());
    Read {
        rows: (0..file.len()).map(|row| (file.line(row), said(row))).collect(),
        broken: file.broken().map(told),
        notes: file.notes().iter().map(told).collect(),
    }
}

fn record(row: &Value) -> std::result::Result<Record, String> {
    let file = open("rows.jsonl", row.to_string().as_bytes()).unwrap();
    file.record(0).map_err(|reason| format!("{} | {}", reason.what, reason.hint))
}

/// A row with marks in its texts that could be taken for JSON's.
fn row(n: usize) -> String {
    json!({"instruction": format!("q{n} {{\"[],\\"), "input": "", "output": format!("a{n}")}).to_string()
}

fn rows(n: usize) -> Vec<String> {
    (0..n).map(row).collect()
}

fn array(rows: &[String]) -> String {
    format!("[\n{}\n]\n", rows.join(",\n"))
}

#[test]
fn one_fault_in_an_array_costs_one_row() {
    type Break = (&'static str, fn(&str) -> String, &'static str);
    let breaks: [Break; 12] = [
        ("a quote", |row| row.replacen("\"q", "q", 1), "not valid JSON"),
        (
            "a closing quote",
            |row| row.replacen("\", \"output", ", \"output", 1).replacen("\",\"input", ",\"input", 1),
            "JSON",
        ),
        ("a quote at the end", |row| row.replacen("\"}", "}", 1), "JSON"),
        ("a brace", |row| row.replacen("\"}", "\"", 1), "JSON"),
        ("the first brace", |row| row.replacen('{', "", 1), "JSON"),
        ("a bracket too many", |row| row.replacen("\"}", "\"]}", 1), "JSON"),
        ("a brace too many", |row| format!("{row}}}"), "closes nothing"),
        ("a colon", |row| row.replacen("\":", "\"", 1), "JSON"),
        ("a line break in a text", |row| row.replacen("q5", "q\n5", 1), "over the end of its line"),
        ("NaN", |row| row.replacen("\"input\":\"\"", "\"input\":NaN", 1), "NaN is no value"),
        ("all but its beginning", |row| row[..20].to_owned(), "JSON"),
        ("another type", |_| "17".to_owned(), "must be a JSON object"),
    ];
    let good = rows(100);
    for (what, spoil, reason) in breaks {
        let mut all = good.clone();
        all[5] = spoil(&all[5]);
        let pretty = all.iter().enumerate().map(|(n, row)| match n {
            5 => format!("  {row}"),
            _ => {
                let row: Value = serde_json::from_str(row).unwrap();
                serde_json::to_string_pretty(&row).unwrap().lines().map(|line| format!("  {line}\n")).collect()
            }
        });
        for (layout, content, line) in [
            ("a row a line", array(&all), 7),
            ("bracket on the first row's line", format!("[{}]", all.join(",\n")), 6),
            ("commas first", format!("[ {}\n]", all.join("\n, ")), 6),
            ("indented", format!("[\n  {}\n]", all.join(",\n  ")), 7),
            ("pretty", format!("[\n{}]", pretty.collect::<Vec<_>>().join(",\n")), 32),
            ("CR LF", array(&all).replace('\n', "\r\n"), 7),
        ] {
            let found = read(&content);
            let (at, said) = found.bad();
            // Pretty rows end in a line break and a comma of their own.
            let line_is_right = at == line || layout == "pretty";
            assert!(line_is_right && said.contains(reason), "{what}, {layout}: {at} {said}");
            assert_eq!((found.rows.len(), found.n_good()), (100, 99), "{what}, {layout}");
            assert!(found.notes.is_empty(), "{what}, {layout}: {:?}", found.notes);
        }
    }
    let one_line =
        format!("[{}]", good.join(", ")).replacen("\"q5", "q5", 1).replacen("{\"instruction\":\"q6", "{\"id\":\"q6", 1);
    // Where it cannot be told how many rows are lost, the file is at fault.
    for (what, content, line, reason) in [
        ("all on one line", one_line.clone(), 1, "at least"),
        ("cut off", array(&good)[..3000].to_owned(), 50, "never closed"),
        ("cut off between rows", format!("[\n{},\n", good.join(",\n")), 101, "never closed"),
        ("the last quote", array(&good).replace("a99\"}\n]", "a99}]"), 101, "never closed"),
        ("text after it", array(&good) + "the end", 103, "more after"),
    ] {
        let found = read(content);
        let (at, said) = found.broken.as_ref().unwrap_or_else(|| panic!("{what}: {found:?}"));
        assert!(said.contains(reason), "{what}: {said}");
        assert!(what == "cut off" || *at == line, "{what}: {at}");
    }
    assert!(read(one_line).broken.unwrap().1.contains("at least 93 rows"));
    // On one line, too, where no other row can begin in between.
    let found = read(format!("[{}]", good.join(", ")).replacen("\"q5", "q5", 1));
    assert_eq!((found.rows.len(), found.n_good(), found.broken), (100, 99, None));
    let glued = read(format!("{}\n{}{}\n{}\n", good[0], &good[1][..20], good[2], good[3]));
    assert_eq!((glued.rows.len(), glued.n_good()), (4, 3), "a line that was cut off and gone on with");
    let glued = read(format!("{}\n{} }} {}\n", good[0], good[1], good[2]));
    assert_eq!((glued.rows.len(), glued.n_good()), (3, 2), "a line with a brace too many between two rows");
}

#[test]
fn rows_between_wrong_commas_and_comments_are_read() {
    let good = rows(20);
    for (what, content, n_bad, reason) in [
        ("two commas", array(&good).replacen("},", "},,", 1), 1, "no row before this `,`"),
        ("a comma on its own line", array(&good).replacen("},\n", "},\n,\n", 1), 1, "no row before this `,`"),
        ("three commas", array(&good).replacen("},", "}, , ,", 1), 2, "no row before this `,`"),
        ("a comma first", array(&good).replacen("[\n", "[\n,", 1), 1, "no row before this `,`"),
        ("a comma last", array(&good).replacen("\n]", ",\n]", 1), 1, "no row before this `]`"),
        ("a comment", array(&good).replacen("},", "}, // it's \"so\", [or\n", 1), 1, "comment"),
        ("a comment over lines", array(&good).replacen("},", "}, /* it's,\n \"so\" */", 1), 1, "comment"),
    ] {
        let found = read(&content);
        let bad: Vec<_> = found.rows.iter().filter_map(|(_, row)| row.as_ref().err()).collect();
        assert!(bad.len() == n_bad && bad[0].contains(reason), "{what}: {bad:?}");
        assert_eq!((found.n_good(), &found.broken), (20, &None), "{what}");
    }
    // Valid JSON lacks nothing and is not remarked on, however it lies.
    let nested = json!({"messages": [{"role": "user", "content": "[{\"}],"}, {"role": "assistant", "content": "a0"}]});
    let lists = json!([nested, nested, nested]);
    let flat =
        serde_json::to_string_pretty(&lists).unwrap().lines().map(str::trim_start).collect::<Vec<_>>().join("\n");
    for content in [lists.to_string(), serde_json::to_string_pretty(&lists).unwrap(), flat] {
        let found = read(&content);
        assert_eq!((found.rows.len(), found.n_good()), (3, 3), "{content}");
        assert!(found.notes.is_empty() && found.broken.is_none(), "{found:?}");
    }
}

#[test]
fn files_that_were_joined_are_read_whole_and_it_is_said() {
    let (a, b) = (rows(10), rows(25));
    let (lines_a, lines_b) = (a.join("\n") + "\n", b.join("\n") + "\n");
    const BOM: &str = "\u{feff}";
    for (what, content, n_rows, line, note) in [
        ("two arrays", array(&a) + &array(&b), 35, 13, "another array"),
        ("two arrays on one line", format!("[{}][{}]", a.join(","), b.join(",")), 35, 1, "another array"),
        ("an array, then lines", array(&a) + &lines_b, 35, 13, "another array"),
        ("lines, then an array", lines_b.clone() + &array(&a), 35, 26, "another array"),
        ("lines, then an array on one line", format!("{lines_b}[{}]", a.join(", ")), 35, 26, "another array"),
        ("a line, then an array", format!("{}[{}]", a[0], a.join(",")), 11, 1, "another array"),
        ("marks", format!("{BOM}{lines_a}{BOM}{lines_b}"), 35, 11, "byte-order mark"),
        ("marks and arrays", format!("{BOM}{}{BOM}{}", array(&a), array(&b)), 35, 13, "byte-order mark"),
        ("a mark in an array", array(&a).replacen(",\n", &format!(",\n{BOM}"), 1), 10, 3, "byte-order mark"),
        ("no line break between", a.join("\n") + &lines_b, 35, 10, "several rows stand on one line"),
        ("none and a mark", a.join("\n") + BOM + &lines_b, 35, 10, "byte-order mark"),
        ("all on one line", a.concat(), 10, 1, "several rows stand on one line"),
        ("a comma between", a.join(", "), 10, 1, "several rows stand on one line"),
        ("a space between", a.join(" "), 10, 1, "several rows stand on one line"),
        ("a return between", format!("{}\n{}", a.join("\r"), lines_b), 35, 1, "several rows stand on one line"),
        ("no comma in an array", array(&a).replacen("},", "}", 1), 10, 3, "no comma"),
        ("old Mac", a.join("\r") + "\r", 10, 1, "carriage return"),
        ("old Mac's array", array(&a).replace('\n', "\r"), 10, 2, "carriage return"),
    ] {
        let found = read(&content);
        assert_eq!((found.rows.len(), found.n_good()), (n_rows, n_rows), "{what}: {found:?}");
        assert!(found.broken.is_none(), "{what}: {found:?}");
        let told = found.notes.iter().any(|(at, said)| *at == line && said.contains(note));
        assert!(told, "{what}: {:?}", found.notes);
    }
    let mac = read(rows(3).join("\r"));
    assert_eq!(mac.rows.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [1, 2, 3]);
    for plain in [format!("{BOM}{lines_a}"), format!("{BOM}{BOM}{}", array(&a)), lines_a.replace('\n', "\r\n\r\n")] {
        assert!(read(&plain).notes.is_empty(), "{plain}");
    }
}

#[test]
fn what_is_no_json_is_named_as_what_it_is() {
    for (row, what, hint) in [
        (r#"{"instruction": "q", "input": NaN, "output": "a"}"#, "NaN is no value of JSON (column", "pandas"),
        (r#"{"instruction": "q", "output": "a", "score": NaN}"#, "NaN is no value", "pandas"),
        (r#"{"instruction": "q", "output": "a", "score": -Infinity}"#, "-Infinity is no value", ""),
        (r#"{"instruction": "q", "output": "a", "scores": [1, Infinity]}"#, "Infinity is no value", ""),
        (r#"{"instruction": "q", "input": None, "output": "a"}"#, "None is Python's", "json.dumps"),
        (r#"{"instruction": "q", "output": "a", "ok": True}"#, "True is Python's", "json.dumps"),
        (r#"{"instruction": "q", "input": undefined, "output": "a"}"#, "undefined is JavaScript's", "null"),
        (r#"{'instruction': 'q', 'output': 'a'}"#, "single quotes", "json.dumps"),
        (r#"{"instruction": 'q', "output": "a"}"#, "single quotes", "json.dumps"),
        (r#"{"instruction": "q", "output": "a",}"#, "a comma too many", "remove"),
        (r#"{"instruction": "q", "output": "a"},"#, "a comma too many", "remove"),
        (r#"{"instruction": "q", "tags": [1, 2,], "output": "a"}"#, "a comma too many", "remove"),
        (r#"{"instruction": "q", "output": "a"} // so"#, "comment", "remove"),
        (r#"{"instruction": "q", /* so */ "output": "a"}"#, "comment", "remove"),
        (r#"{"instruction": "q", # so"#, "comment", "remove"),
        (r#"{"instruction": "q", "output": "\ud83d"}"#, "half a character", "emoji"),
        (r#"{"instruction": "\udc00q", "output": "a"}"#, "half a character", "emoji"),
        ("{\"instruction\": \"q\0\", \"output\": \"a\"}", "NUL byte", "damaged"),
        ("{\"instruction\": \"q\", \0\0\0\0", "NUL byte", "damaged"),
        ("\0\0\0\0\0", "NUL byte", "damaged"),
        ("{\"instruction\": \"q\tr\", \"output\": \"a\"}", "control character", "\\t"),
        (r#"{"instruction": "q", "output": "a", "output": "b"}"#, "holds the key `output` twice", "keep one"),
        (r#"{"instruction": "q", "output": null, "output": "b"}"#, "holds the key `output` twice", "keep one"),
        (
            r#"{"instruction": "q", "output": "a", "weight": 1, "weight": 0}"#,
            "holds the key `weight` twice",
            "keep one",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]}"#,
            "holds the key `content` twice",
            "keep one",
        ),
        (r#"{"instruction": "q", "output": 5}"#, "`output` must be a string, this is a number", ""),
        (r#"{"instruction": "q", "output": "a"} }"#, "closes nothing", ""),
    ] {
        for content in
            [format!("{}\n{row}\n{}\n", self::row(0), self::row(1)), format!("[\n{}\n,\n{row}\n]", self::row(0))]
        {
            if content.starts_with('[')
                && (row.contains('#') || row.contains("//") || row.ends_with(',') || row.contains("\0\0"))
            {
                continue;
            }
            let file = open("rows", content.as_bytes()).unwrap();
            let reason = (0..file.len()).find_map(|row| file.record(row).err()).unwrap_or_else(|| panic!("{row}"));
            assert!(reason.what.contains(what) && reason.hint.contains(hint), "{row}: {reason:?}");
        }
    }
    // What looks so within a text is text.
    let fine =
        json!({"instruction": "NaN, // None 'x' \u{2028}\u{2029}\u{feff}\0", "output": "{'a': Infinity,}"}).to_string();
    assert_eq!(read(fine).n_good(), 1);
}

#[test]
fn other_encodings_are_named_with_the_command_that_converts_them() {
    let text = row(0) + "\n" + &json!({"instruction": "你好", "output": "好"}).to_string() + "\n";
    let utf16: Vec<u16> = text.encode_utf16().collect();
    let utf32: Vec<u32> = text.chars().map(u32::from).collect();
    let le16: Vec<u8> = utf16.iter().flat_map(|unit| unit.to_le_bytes()).collect();
    let be16: Vec<u8> = utf16.iter().flat_map(|unit| unit.to_be_bytes()).collect();
    let le32: Vec<u8> = utf32.iter().flat_map(|unit| unit.to_le_bytes()).collect();
    let be32: Vec<u8> = utf32.iter().flat_map(|unit| unit.to_be_bytes()).collect();
    for (content, what, command) in [
        ([&b"\xff\xfe"[..], &le16].concat(), "in UTF-16,", "iconv -f UTF-16 -t UTF-8"),
        ([&b"\xfe\xff"[..], &be16].concat(), "in UTF-16,", "iconv -f UTF-16 -t UTF-8"),
        (le16, "in UTF-16,", "iconv -f UTF-16LE -t UTF-8"),
        (be16, "in UTF-16,", "iconv -f UTF-16BE -t UTF-8"),
        ([&b"\xff\xfe\0\0"[..], &le32].concat(), "in UTF-32,", "iconv -f UTF-32 -t UTF-8"),
        ([&b"\0\0\xfe\xff"[..], &be32].concat(), "in UTF-32,", "iconv -f UTF-32 -t UTF-8"),
        (le32, "in UTF-32,", "iconv -f UTF-32LE -t UTF-8"),
        (be32, "in UTF-32,", "iconv -f UTF-32BE -t UTF-8"),
        (vec![0; 64], "NUL bytes", "again"),
        (b"[{'instruction': \"it's\", 'output': 'a'}]".to_vec(), "single quotes", "json.dumps"),
        (b"// rows\n{}".to_vec(), "begins with a comment", "remove"),
        (b"{\"instruction\": \"q\",\n \"output\": \"a\"}\n".to_vec(), "over several lines", "jq -c . '"),
    ] {
        let error = open("my rows.jsonl", &content).unwrap_err();
        let fault = &error.faults()[0];
        assert!(fault.what.contains(what) && fault.hint.contains(command), "{fault:?}");
        assert!(!fault.hint.contains("FILE") && (!command.contains("iconv") || fault.hint.contains("my rows.jsonl'")));
    }
}

/// A dialogue whose last turn, or another one, has more keys.
fn dialogue(turn: usize, more: Value) -> Value {
    let mut turns = vec![
        json!({"role": "system", "content": "s"}),
        json!({"role": "user", "content": "q"}),
        json!({"role": "assistant", "content": "a"}),
        json!({"role": "user", "content": "q"}),
        json!({"role": "assistant", "content": "a"}),
    ];
    turns[turn].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({"messages": turns})
}

#[test]
fn what_a_row_says_about_learning_is_honoured_or_the_row_is_bad() {
    let with = |more: Value| {
        let mut row = json!({"instruction": "q", "output": "a"});
        row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        row
    };
    let call = json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]);
    const NOT: &str = "is not to be learned";
    for (row, reason) in [
        (dialogue(4, json!({"weight": 0})), NOT),
        (dialogue(4, json!({"weight": 0.0})), NOT),
        (dialogue(4, json!({"weight": false})), NOT),
        (dialogue(4, json!({"loss": false})), NOT),
        (json!({"instruction": "q", "output": "a", "Loss-Weight": 0}), NOT),
        (json!({"instruction": "q", "output": "a", "trainable": false}), NOT),
        (json!({"instruction": "q", "output": "a", "skip": true}), NOT),
        (json!({"instruction": "q", "output": "a", "kto_tag": "false"}), "has a string as `kto_tag`"),
        (json!({"instruction": "q", "output": "a", "system_prompt": "S"}), "the key of a system prompt is `system`"),
        (dialogue(4, json!({"thought": "hm"})), "reasoning beside the answer"),
        (dialogue(4, json!({"train": false, "weight": 1})), NOT),
        (dialogue(4, json!({"training": false})), NOT),
        (dialogue(4, json!({"loss_scale": 0})), NOT),
        (dialogue(4, json!({"weight": 0.5})), "has 0.5 as `weight`"),
        (dialogue(2, json!({"weight": 2})), "turn 3 of `messages` has 2 as `weight`"),
        (dialogue(4, json!({"weight": "0"})), "has a string as `weight`"),
        (
            dialogue(4, json!({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": false}]})),
            "`train_detail`",
        ),
        (dialogue(1, json!({"weight": 1})), "turn 2 of `messages` is to be learned, it says"),
        (dialogue(0, json!({"train": true})), "turn 1 of `messages` is to be learned, it says"),
        (dialogue(4, json!({"tool_calls": call})), "turn 5 of `messages` holds `tool_calls`"),
        (dialogue(2, json!({"tool_calls": call, "content": null})), "holds `tool_calls`"),
        (dialogue(4, json!({"function_call": {"name": "f", "arguments": ""}})), "holds `function_call`"),
        (dialogue(4, json!({"reasoning_content": "hm"})), "holds `reasoning_content`"),
        (dialogue(2, json!({"thinking": "hm"})), "holds `thinking`"),
        (dialogue(4, json!({"refusal": "no", "content": null})), "holds `refusal`"),
        (dialogue(1, json!({"images": ["a.png"]})), "holds `images`"),
        (
            dialogue(4, json!({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})),
            "2 parts of text",
        ),
        (dialogue(1, json!({"content": [{"type": "image_url", "image_url": {"url": "x"}}]})), "type `image_url`"),
        (dialogue(1, json!({"role": "tool"})), "is by `tool`"),
        (dialogue(1, json!({"role": "function"})), "calls of tools"),
        (dialogue(1, json!({"role": "observation"})), "calls of tools"),
        (dialogue(0, json!({"role": "developer"})), "write `system`"),
        (with(json!({"weight": 0})), NOT),
        (with(json!({"weight": 0.3})), "has 0.3 as `weight`"),
        (with(json!({"loss": false})), NOT),
        (with(json!({"train": false})), NOT),
        (with(json!({"kto_tag": false})), NOT),
        (with(json!({"label": false})), NOT),
        (with(json!({"loss_mask": [0, 1]})), "holds `loss_mask`"),
        (with(json!({"mask": "Assistant"})), "holds `mask`"),
        (with(json!({"tools": call})), "holds `tools`"),
        (with(json!({"tools": "[{\"name\": \"f\"}]"})), "holds `tools`"),
        (with(json!({"functions": [{"name": "f"}]})), "holds `functions`"),
        (with(json!({"images": ["a.png"]})), "holds `images`"),
        (with(json!({"reasoning_content": "hm"})), "holds `reasoning_content`"),
        (with(json!({"rejected": "b"})), "preference pairs"),
        (json!({"instruction": "q", "chosen": "a", "rejected": "b"}), "preference pairs"),
        (json!({"prompt": "q", "chosen": "a", "rejected": "b"}), "preference pairs"),
        (json!({"text": "Once upon a time"}), "plain text"),
    ] {
        let said = record(&row).expect_err(&row.to_string());
        let (_, hint) = said.split_once(" | ").unwrap();
        assert!(said.contains(reason) && !hint.is_empty(), "{row}: {said}");
    }
    for (row, asks_for_earlier) in [
        (dialogue(4, json!({"weight": 1, "train": true, "loss": true})), false),
        (
            dialogue(
                4,
                json!({"weight": 1.0, "name": "x", "refusal": null, "tool_calls": null, "function_call": null}),
            ),
            false,
        ),
        (dialogue(4, json!({"weight": null, "tool_calls": [], "reasoning_content": "", "images": []})), false),
        (dialogue(4, json!({"content": [{"type": "text", "text": "a"}]})), false),
        (dialogue(2, json!({"weight": 0})), false),
        (dialogue(2, json!({"loss": false})), false),
        (dialogue(1, json!({"train": false})), false),
        (dialogue(2, json!({"train": true})), true),
        (
            with(json!({"weight": 1, "tools": "[]", "images": null, "label": "news", "kto_tag": true, "mask": "User"})),
            false,
        ),
        (with(json!({"thinking": false, "loss_mask": [], "chosen": "", "rejected": null})), false),
    ] {
        let found = record(&row).unwrap_or_else(|said| panic!("{row}: {said}"));
        assert_eq!((found.answer.as_str(), found.asks_for_earlier), ("a", asks_for_earlier), "{row}");
    }
}

/// Random damage: nothing panics, and what is not damaged is still there, or the file is at fault.
#[test]
fn damaged_files_lose_no_whole_row_unsaid() {
    let mut state = 7u64;
    let mut below = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let all = rows(30);
    let contents = [array(&all), all.join("\n") + "\n", format!("[{}]", all.join(", "))];
    for round in 0..6_000 {
        let mut content = contents[round % 3].clone().into_bytes();
        let is_cut = below(4) == 0;
        let n_damages = 1 + below(2);
        if is_cut {
            content.truncate(1 + below(content.len() - 1));
        }
        for _ in 0..n_damages {
            let at = below(content.len());
            let byte = b"\"{}[],:\\\n\r \0a7'\xef"[below(16)];
            match below(3) {
                0 => content[at] = byte,
                1 => content.insert(at, byte),
                _ if content.len() > 1 => drop(content.remove(at)),
                _ => {}
            }
        }
        let Ok(file) = open("rows", &content) else { continue };
        let good = (0..file.len()).filter(|row| file.record(*row).is_ok()).count();
        let is_whole = file.broken().is_none() && !is_cut;
        assert!(!is_whole || file.len() + n_damages >= 30, "{} {}", file.len(), String::from_utf8_lossy(&content));
        // A byte can spoil two rows where it joins them, and all where it is the bracket that makes them an array.
        let is_of_kind = content[0] == contents[round % 3].as_bytes()[0];
        let least = 30 - 2 * n_damages;
        assert!(!is_whole || !is_of_kind || good >= least, "{good} {}", String::from_utf8_lossy(&content));
    }
}
