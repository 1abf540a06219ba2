//! Data files, templates, samples, the token cache, the order of samples, packing and loss weights.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bellora::data::reason::Reason;
use bellora::data::record::Record;
use bellora::data::rows::RowFile;
use bellora::data::{
    Answers, Conversation, DataSpec, Dataset, EpochOrder, LossAverage, Prompting, SpecialTokens, Template,
    TemplateFile, TokenCache, Tokenizer, Truncation, build_batches, order, pack, prompt_ids, template_check,
};
use serde_json::{Value, json};

use super::tokens::{folder, tiny};

fn record(row: &str) -> Result<Record, Reason> {
    let folder = folder(&[("rows.jsonl", row.as_bytes())]);
    RowFile::read(&folder.path().join("rows.jsonl")).unwrap().record(0)
}

fn expected(history: &[(&str, &str)], question: &str, answer: &str) -> Record {
    let history = history.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
    Record { history, question: question.into(), answer: answer.into(), ..Record::default() }
}

#[test]
fn every_format_of_records_is_read() {
    let single = expected(&[], "1+1", " 2\n");
    let dialogue = expected(&[("hi", "hello")], "1+1", " 2\n");
    for (row, wanted) in [
        (r#"{"instruction": "1+1", "output": " 2\n"}"#, &single),
        (r#"{"instruction": "1+1", "input": null, "history": null, "output": " 2\n", "id": [{}]}"#, &single),
        (r#"{"instruction": "1+1", "input": "", "history": [], "system": "", "output": " 2\n"}"#, &single),
        (r#"{"instruction": "1", "input": "+1", "output": ""}"#, &expected(&[], "1\n+1", "")),
        (r#"{"instruction": "", "output": ""}"#, &expected(&[], "", "")),
        (r#"{"input": "1+1", "target": " 2\n"}"#, &single),
        (r#"{"instruction": "Human:a\nAssistant:", "output": "b"}"#, &expected(&[], "Human:a\nAssistant:", "b")),
        (r#"{"instruction": "1+1", "history": [["hi", "hello"]], "output": " 2\n"}"#, &dialogue),
        (
            r#"{"id": "7", "conversations": [{"from": "human", "value": "hi"}, {"from": "assistant", "value": "hello"},
                {"from": "Human", "value": "1+1"}, {"from": "gpt", "value": " 2\n"}]}"#,
            &dialogue,
        ),
        (
            r#"{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "hello"}, {"role": "user", "content": "1+1"},
                {"role": "assistant", "content": " 2\n"}]}"#,
            &dialogue,
        ),
    ] {
        let passed_over = if row.contains("\"id\"") { vec!["id".to_owned()] } else { Vec::new() };
        let wanted = Record { passed_over, ..wanted.clone() };
        assert_eq!(record(&row.replace('\n', " ")), Ok(wanted), "{row}");
    }
    let system = record(
        r#"{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"}]}"#
            .replace('\n', " ")
            .as_str(),
    );
    assert_eq!(system, Ok(Record { system: Some("S".into()), ..expected(&[], "q", "a") }));
}

#[test]
fn keys_that_are_passed_over_are_counted() {
    let rows = concat!(
        r#"{"instruction": "q", "output": "a", "id": 1, "source": "x"}"#,
        "\n",
        r#"{"id": 2, "instruction": "q", "output": "b"}"#,
    );
    let folder = folder(&[("rows.jsonl", rows.as_bytes())]);
    let cache = folder.path().join("cache");
    for _ in ["made", "read from the cache"] {
        let spec = spec(vec![folder.path().join("rows.jsonl")]);
        let keep = TokenCache::Keep { folder: &cache, is_required: true, max_bytes: u64::MAX };
        let stats = Dataset::load(&spec, &tiny(), &bare(), keep).unwrap().stats();
        let counted: Vec<(&str, usize)> = stats.passed_over.iter().map(|(key, rows)| (key.as_str(), *rows)).collect();
        assert_eq!(counted, [("id", 2), ("source", 1)]);
    }
}

#[test]
fn bad_rows_say_what_is_wrong() {
    let turns = |turns: &[(&str, &str)]| {
        let turns: Vec<Value> = turns.iter().map(|(from, value)| json!({"from": from, "value": value})).collect();
        json!({"conversations": turns}).to_string()
    };
    let deep = format!("{{\"instruction\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for (row, reason) in [
        (r#"{"instruction": "a"}"#.to_owned(), "has an `instruction` but no `output`"),
        (r#"{"instruction": "a", "output": null}"#.into(), "has an `instruction` but no `output`"),
        (r#"{"output": "a"}"#.into(), "has an `output` but no `instruction`"),
        (r#"{"instruction": null, "output": "a"}"#.into(), "has an `output` but no `instruction`"),
        (r#"{"input": "a"}"#.into(), "has no `target`"),
        (r#"{"prompt": "a", "completion": "b"}"#.into(), "its keys are `prompt`, `completion`"),
        ("{}".into(), "it has no keys"),
        (r#"{"instruction": 3, "output": "a"}"#.into(), "`instruction` must be a string, this is a number"),
        (r#"{"instruction": "a", "input": ["b"], "output": "a"}"#.into(), "`input` must be a string, this is a list"),
        (r#"{"instruction": "a", "output": {}}"#.into(), "`output` must be a string, this is an object"),
        (r#"{"instruction": "a", "history": "b", "output": "c"}"#.into(), "`history` must be a list"),
        (r#"{"instruction": "a", "history": [["b"]], "output": "c"}"#.into(), "a list of two strings"),
        (r#"{"instruction": "a", "output": "b", "output": "c"}"#.into(), "holds the key `output` twice"),
        (r#"{"instruction": "a", "conversations": []}"#.into(), "both a dialogue and an `instruction`"),
        (r#"{"conversations": [], "messages": []}"#.into(), "both `conversations` and `messages`"),
        (r#"{"conversations": []}"#.into(), "no turns"),
        (r#"{"messages": {}}"#.into(), "`messages` must be a list of turns"),
        (r#"{"messages": ["a"]}"#.into(), "turn 1 of `messages` must be an object"),
        (r#"{"messages": [["user", "a"]]}"#.into(), "turn 1 of `messages` must be an object, it is a list"),
        (r#"{"messages": [{"role": "user"}]}"#.into(), "turn 1 of `messages` has no `value` (or `content`)"),
        (r#"{"messages": [{"role": "user", "content": [1]}]}"#.into(), "has a list as `content`"),
        (r#"{"messages": [{"role": "tool", "content": "a"}]}"#.into(), "is by `tool`"),
        (turns(&[("human", "a")]), "ends with a user turn"),
        (turns(&[("human", "a"), ("gpt", "b"), ("human", "c")]), "ends with a user turn"),
        (turns(&[("human", "a"), ("human", "b"), ("gpt", "c")]), "turn 2 of `conversations` is a second user turn"),
        (turns(&[("gpt", "a")]), "turn 1 of `conversations` is an assistant turn without"),
        (turns(&[("human", "a"), ("gpt", "b"), ("gpt", "c")]), "turn 3 of `conversations` is an assistant turn"),
        (turns(&[("human", "a"), ("system", "b")]), "turn 2 of `conversations` is a system prompt"),
        (r#"{"instruction": "\ud83d", "output": "a"}"#.into(), "is not valid JSON: a string holds half"),
        (r#"{"instruction": "a", "output": "b""#.into(), "is not valid JSON: EOF"),
        ("{\"instruction\": \"a\u{0}\", \"output\": \"b\"}".into(), "is not valid JSON: there is a NUL byte"),
        (deep, "is not valid JSON: recursion limit"),
    ] {
        let found = record(&row).expect_err(&row).what;
        assert!(found.contains(reason), "{}: {found}", &row[..row.len().min(80)]);
    }
}

/// A line, and the answer that stands there or what is wrong with it.
type Said = (u32, String);

/// The rows of a file, and where it broke off.
fn rows_of(content: &[u8]) -> (Vec<Said>, Option<Said>) {
    let folder = folder(&[("rows", content)]);
    let file = RowFile::read(&folder.path().join("rows")).unwrap();
    let said = |row| match file.record(row) {
        Ok(record) => record.answer,
        Err(reason) => reason.what,
    };
    let rows = (0..file.len()).map(|row| (file.line(row), said(row))).collect();
    (rows, file.broken().map(|(line, reason)| (*line, reason.what.clone())))
}

#[test]
fn rows_are_found_in_arrays_and_lines_with_their_line_numbers() {
    let row = |answer: &str| json!({"instruction": "[{\"]}", "output": answer}).to_string();
    let (a, b) = (row("a"), row("b"));
    let two = |first, second| (vec![(first, "a".to_owned()), (second, "b".to_owned())], None);
    let pretty = a.replace(",", ",\n");
    for (content, wanted) in [
        (format!("{a}\n{b}\n"), two(1, 2)),
        (format!("\u{feff}{a}\r\n\r\n  {b}"), two(1, 3)),
        (format!("[{a},{b}]"), two(1, 1)),
        (format!("\u{feff} \r\n[\n{pretty} ,\n\n{b}\n]\n\n"), two(3, 6)),
    ] {
        assert_eq!(rows_of(content.as_bytes()), wanted, "{content}");
    }
    // A row with a missing bracket is bad by itself where the next one begins as it does.
    let (rows, broken) = rows_of(format!("[{a},\n3,\n{{\"a\": [}},\n{b}]").as_bytes());
    assert_eq!((rows.len(), &rows[1].1[..23], broken), (4, "a row must be a JSON ob", None));
    assert_eq!((rows[2].0, &rows[3]), (3, &(4, "b".to_owned())));
    for (content, line, reason) in [
        (format!("[{a},\n{{\"instruction\": \"b}}]"), 2, "never closed"),
        (format!("[{a},\n{b}"), 2, "never closed"),
        ("[".into(), 1, "never closed"),
        (format!("[{a}]\nmore"), 2, "more after the array"),
    ] {
        let (found_line, found) = rows_of(content.as_bytes()).1.expect("broken");
        assert!(found_line == line && found.contains(reason), "{content}: {found_line} {found}");
    }
    // Text that is no UTF-8 and a row that is no object are faults of their row alone.
    let (rows, _) = rows_of(&[a.as_bytes(), b"\n{\"instruction\": \"\xff\"}\n[1]\n", b.as_bytes()].concat());
    assert!(rows[1].1.contains("not valid UTF-8 (byte 18"), "{rows:?}");
    assert!(rows[2].1.contains("this is a list") && rows[3] == (4, "b".into()), "{rows:?}");
    let long = row(&"好".repeat(1 << 20));
    assert_eq!(rows_of(long.as_bytes()).0[0].1.len(), 3 << 20, "one giant line");
}

#[test]
fn files_of_another_kind_are_refused_by_name() {
    for (name, content, reason) in [
        ("rows.parquet", &b"PAR1"[..], "Parquet"),
        ("rows.csv", b"a,b", "is a table"),
        ("rows.json.gz", b"\x1f\x8b", "compressed"),
        ("rows.json", b"\x1f\x8b", "gzip"),
        ("rows.json", b"PAR1....", "Parquet"),
        ("rows.jsonl", b"\xff\xfe{\x00", "UTF-16"),
        ("rows.jsonl", b"version https://git-lfs", "git-lfs"),
        ("rows.jsonl", b"", "is empty"),
        ("rows.jsonl", b"\xef\xbb\xbf \n\r\n", "is empty"),
        ("rows.json", b"[ ]", "holds no rows"),
        ("rows.txt", b"hello", "neither a JSON array nor JSON lines"),
        ("rows.json", b"{\n  \"instruction\": \"a\"\n}\n", "over several lines"),
    ] {
        let folder = folder(&[(name, content)]);
        let error = RowFile::read(&folder.path().join(name)).unwrap_err();
        assert!(error.to_string().contains(reason) && error.exit_code() == 2, "{error}");
    }
    let error = RowFile::read(Path::new("no/such.jsonl")).unwrap_err();
    assert_eq!((error.to_string().as_str(), error.exit_code()), ("no/such.jsonl: does not exist", 2));
}

fn prompt(template: &Template, record: &Record) -> String {
    template.prompt(record).unwrap().iter().map(|part| part.text).collect()
}

#[test]
fn templates_are_byte_for_byte() {
    let sentence =
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.";
    let dialogue = expected(&[("a", " b"), ("c\n", "d")], "e", "");
    for (template, before, after) in [
        ("alpaca", "\n\n### Instruction:\n\n", "\n\n### Response:\n\n"),
        ("chinese-alpaca", "\n\n### Instruction:\n", "\n\n### Response: "),
    ] {
        let template = Template::find(template).unwrap();
        assert_eq!(prompt(&template, &Record::question(" q\n")), format!("{sentence}{before} q\n{after}"));
        let content = "Human:a\nAssistant: b\nHuman:c\n\nAssistant:d\nHuman:e";
        assert_eq!(prompt(&template, &dialogue), format!("{sentence}{before}{content}{after}"));
        let system = Record { system: Some("S".into()), ..dialogue.clone() };
        assert!(template.prompt(&system).unwrap_err().what.contains("no place for one"));
    }
}

#[test]
fn a_template_file_says_every_string_and_travels_with_the_adapter() {
    let chat = "system = [\"<|s|>\", \"\\n\"]\nuser = [\"<u>\", \"</u>\"]\nreply = [\"<r>\", \"</r>\\n\"]\nstop = [\"</r>\", \"<s>\"]\n";
    let files = folder(&[
        ("chat.toml", chat.as_bytes()),
        ("full.toml", format!("start = \"^\"\nend = \"$\"\nonly_user = [\"(\", \")\"]\n{chat}").as_bytes()),
        ("typo.toml", format!("{chat}\nsuffix = \"a\"").as_bytes()),
        ("empty.toml", chat.replace("\"<s>\"", "\"\"").as_bytes()),
        ("lacking.toml", b"user = [\"a\", \"b\"]"),
    ]);
    let find = |name: &str| Template::find(files.path().join(name).to_str().unwrap());
    let (single, dialogue) = (Record::question("q"), expected(&[("a", "b")], "q", ""));
    let system = Record { system: Some("S".into()), ..dialogue.clone() };
    let chat = find("chat.toml").unwrap();
    assert_eq!(prompt(&chat, &single), "<u>q</u><r>");
    assert_eq!(prompt(&chat, &system), "<|s|>S\n<u>a</u><r>b</r>\n<u>q</u><r>");
    let full = find("full.toml").unwrap();
    assert_eq!(prompt(&full, &single), "^(q)$");
    assert_eq!(prompt(&full, &dialogue), "^<u>a</u><r>b</r>\n<u>q</u>$");
    for (name, reason) in [("typo.toml", "suffix"), ("empty.toml", "empty string"), ("lacking.toml", "reply")] {
        let error = find(name).unwrap_err();
        assert!(error.to_string().contains(reason) && error.to_string().contains(name), "{error}");
    }
    assert!(find("none.toml").unwrap_err().to_string().contains("cannot be read"));
    assert!(Template::find("alpca").unwrap_err().to_string().contains("`alpca` is no template"));

    let tokenizer = tiny();
    let file = TemplateFile::new(&Prompting::from(chat), &tokenizer, SpecialTokens::Text);
    assert_eq!(file.stop_token_ids, [1, 2], "</s> always, <s> because it is one token");
    std::fs::write(files.path().join(TemplateFile::NAME), file.to_json()).unwrap();
    assert_eq!(TemplateFile::load(files.path()).unwrap(), Some(file));
    assert_eq!(TemplateFile::load(&files.path().join("elsewhere")).unwrap(), None);
}

fn spec(files: Vec<PathBuf>) -> DataSpec {
    DataSpec {
        files,
        max_length: 512,
        truncation: Truncation::Drop,
        special_tokens: SpecialTokens::Special,
        answers: Answers::Last,
        max_bad_rows: 0,
    }
}

/// A template of almost nothing, so that lengths can be read off.
fn bare() -> Prompting {
    let none = [String::new(), String::new()];
    Prompting::from(Template {
        name: "bare".into(),
        start: String::new(),
        system: None,
        user: none.clone(),
        only_user: none.clone(),
        reply: none,
        end: String::new(),
        stop: Vec::new(),
    })
}

/// The tokens of a sample that are learned, of which there is one run here.
fn first_span(dataset: &Dataset, sample: usize) -> std::ops::Range<usize> {
    dataset.spans(sample).next().unwrap()
}

fn rows(pairs: &[(&str, &str)]) -> String {
    let row = |(question, answer): &(&str, &str)| json!({"instruction": question, "output": answer}).to_string() + "\n";
    pairs.iter().map(row).collect()
}

fn load(content: &str, change: impl Fn(&mut DataSpec)) -> bellora::error::Result<Dataset> {
    let folder = folder(&[("rows.jsonl", content.as_bytes())]);
    let mut spec = spec(vec![folder.path().join("rows.jsonl")]);
    change(&mut spec);
    Dataset::load(&spec, &tiny(), &bare(), TokenCache::Off)
}

#[test]
fn a_sample_is_prompt_then_answer_each_encoded_by_itself() {
    let tokenizer = tiny();
    let ids = |text: &str| tokenizer.encode(text, SpecialTokens::Text).unwrap();
    let content = rows(&[("ab", " c"), ("ab", ""), ("", "a"), ("a</s>", "b")]);
    let dataset = load(&content, |_| {}).unwrap();
    let wanted = [
        ([vec![1], ids("ab")].concat(), [ids(" c"), vec![2]].concat()),
        ([vec![1], ids("ab")].concat(), vec![2]),
        (vec![1], [ids("a"), vec![2]].concat()),
        ([vec![1], ids("a"), vec![2]].concat(), [ids("b"), vec![2]].concat()),
    ];
    for (sample, (prompt, answer)) in wanted.iter().enumerate() {
        assert_eq!(dataset.ids(sample), [prompt.as_slice(), answer].concat());
        assert_eq!((first_span(&dataset, sample).start, dataset.label_tokens(sample)), (prompt.len(), answer.len()));
        assert!(dataset.place(sample).ends_with(&format!("rows.jsonl:{}", sample + 1)));
    }
    assert_eq!(dataset.stats().rows_with_special_tokens, 1);
    let mut dump = Vec::new();
    dataset.select(&[2]).write_dump(&mut dump).unwrap();
    assert_eq!(String::from_utf8(dump).unwrap(), "{\"input_ids\":[1,9,2],\"labels\":[-100,9,2]}\n");
    let prompt =
        prompt_ids("--prompt", &tokenizer, &bare(), SpecialTokens::Special, &Conversation::question("ab")).unwrap();
    assert_eq!(prompt, wanted[0].0);

    // Too long for six tokens: the first in its prompt, the last in its answer.
    let content = rows(&[("x x x x", "a"), ("a", "a"), ("a", "x x x x")]);
    let short = |truncation| load(&content, move |spec| (spec.max_length, spec.truncation) = (6, truncation));
    let dropped = short(Truncation::Drop).unwrap();
    let stats = dropped.stats();
    assert_eq!((stats.rows, stats.samples, stats.dropped, stats.cut), (3, 1, 2, 0));
    assert!(stats.dropped_places[0].ends_with("rows.jsonl:1 (11 tokens)"), "{:?}", stats.dropped_places);
    assert_eq!((dropped.ids(0), dropped.place(0).ends_with(":2")), (&[1, 9, 9, 2][..], true));
    let cut = short(Truncation::Cut).unwrap();
    let stats = cut.stats();
    assert_eq!((stats.samples, stats.dropped, stats.cut, stats.with_nothing_to_learn), (3, 0, 2, 1));
    assert_eq!((cut.ids(0).len(), first_span(&cut, 0).start, cut.label_tokens(0)), (6, 6, 0));
    assert_eq!((load(&rows(&[("a", ""), ("a", " \n"), ("a", "b")]), |_| {}).unwrap().stats().with_no_answer), 2);
    assert_eq!((cut.ids(2).len(), cut.label_tokens(2), stats.max_len), (6, 4, 6));
    assert!(!cut.ids(2).contains(&2), "the end is cut off too");
    assert_eq!((stats.tokens, stats.label_tokens), (16, 6));
    let error = short(Truncation::Error).err().unwrap();
    assert_eq!((error.faults().len(), error.exit_code()), (3, 2), "{error}");
    assert!(error.to_string().contains("rows.jsonl:1: has 11 tokens"), "{error}");
    let none = load(&content, |spec| spec.max_length = 2).err().unwrap();
    assert!(none.to_string().contains("leaves no sample to use: of 3 rows 0 are bad and 3 have more"), "{none}");
}

#[test]
fn bad_rows_are_counted_and_named_and_nothing_is_kept_beyond_the_allowed() {
    let bad = "{\"instruction\": 1}\n".repeat(30);
    let files =
        folder(&[("good.jsonl", rows(&[("a", "b")]).as_bytes()), ("bad.jsonl", bad.as_bytes()), ("x.csv", b"a")]);
    let paths = |names: &[&str]| names.iter().map(|name| files.path().join(name)).collect();
    let cache = files.path().join("cache");
    let load = |names: &[&str], max_bad_rows| {
        let spec = DataSpec { max_bad_rows, ..spec(paths(names)) };
        Dataset::load(
            &spec,
            &tiny(),
            &bare(),
            TokenCache::Keep { folder: &cache, is_required: true, max_bytes: u64::MAX },
        )
    };
    let error = load(&["good.jsonl", "bad.jsonl", "x.csv"], 29).err().unwrap();
    let faults = error.faults();
    assert_eq!((faults.len(), error.exit_code()), (22, 2), "the file, the first 20 rows, the number of all: {error}");
    assert!(faults[0].place.ends_with("x.csv") && faults[1].place.ends_with("bad.jsonl:1"), "{error}");
    assert!(faults[21].what.contains("30 of 31 rows are bad"), "{}", faults[21]);
    assert!(load(&["good.jsonl", "bad.jsonl"], 29).is_err() && !cache.exists());
    assert_eq!(load(&["good.jsonl", "bad.jsonl"], 30).unwrap().stats().bad_rows, 30);
    // Allowing fewer later is not talked round by the cache.
    assert!(load(&["good.jsonl", "bad.jsonl"], 29).is_err());
    let stats = load(&["good.jsonl", "bad.jsonl"], 30).unwrap().stats();
    assert_eq!((stats.from_cache, stats.bad_row_faults.len(), stats.samples), (true, 20, 1));
}

#[test]
fn the_cache_deletes_what_is_abandoned_and_what_was_unused_for_longest() {
    let files = folder(&[]);
    let cache = files.path().join("cache");
    let keep = |name: &str, answer: &str, max_bytes: u64| {
        let path = files.path().join(name);
        std::fs::write(&path, rows(&[("question", answer)])).unwrap();
        let keep = TokenCache::Keep { folder: &cache, is_required: true, max_bytes };
        Dataset::load(&spec(vec![path]), &tiny(), &bare(), keep).unwrap().stats().from_cache
    };
    let kept = || {
        let paths = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|end| end == "tokens")).collect::<Vec<_>>()
    };
    let one = |paths: &[PathBuf]| std::fs::metadata(&paths[0]).unwrap().len();
    keep("a.jsonl", "a", u64::MAX);
    let [a] = &kept()[..] else { panic!("{:?}", kept()) };
    keep("b.jsonl", "b", u64::MAX);
    let room_for_two = 2 * one(&kept()) + 16;

    // Both were used long ago, and then the first again.
    for path in kept() {
        std::fs::File::open(path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    }
    assert!(keep("a.jsonl", "a", room_for_two), "it is in the cache");
    // What nobody writes any more, what another process is writing, and what is somebody else's.
    for name in [".1.1.0.tmp", ".1.2.0.tmp", "notes.tmp", "notes.txt"] {
        std::fs::write(cache.join(name), "half").unwrap();
    }
    let held = std::fs::File::open(cache.join(".1.2.0.tmp")).unwrap();
    held.lock().unwrap();
    keep("c.jsonl", "c", room_for_two);
    assert!(kept().len() == 2 && kept().contains(a), "{:?}", kept());
    for (name, stays) in [(".1.1.0.tmp", false), (".1.2.0.tmp", true), ("notes.tmp", true), ("notes.txt", true)] {
        assert_eq!(cache.join(name).exists(), stays, "{name}");
    }
    // What was just written stays, whatever it takes.
    keep("d.jsonl", "d", 1);
    assert_eq!(kept().len(), 1);
    assert!(keep("d.jsonl", "d", 1));
}

fn dump(dataset: &Dataset) -> Vec<u8> {
    let mut dump = Vec::new();
    dataset.write_dump(&mut dump).unwrap();
    dump
}

#[test]
fn the_token_cache_is_used_when_it_is_right_and_rebuilt_when_it_is_not() {
    let content = rows(&[("ab", "你好"), ("a</s>", "c"), ("x x x", "x x x x x")]);
    let files = folder(&[("rows.jsonl", content.as_bytes())]);
    let (rows, cache) = (files.path().join("rows.jsonl"), files.path().join("a/b"));
    let tokenizer = tiny();
    let load = |change: &dyn Fn(&mut DataSpec), template: &Prompting, tokenizer: &Tokenizer| {
        let mut spec = spec(vec![rows.clone()]);
        change(&mut spec);
        Dataset::load(
            &spec,
            tokenizer,
            template,
            TokenCache::Keep { folder: &cache, is_required: true, max_bytes: u64::MAX },
        )
        .unwrap()
    };
    let same = || load(&|_| {}, &bare(), &tokenizer);
    let n_files = || std::fs::read_dir(&cache).unwrap().count();
    let first = same();
    assert!(!first.stats().from_cache);
    let again = same();
    assert!(again.stats().from_cache && n_files() == 1);
    assert_eq!(dump(&again), dump(&first));
    assert_eq!(again.place(2), first.place(2));
    let (mut a, b) = (first.stats(), again.stats());
    a.from_cache = true;
    assert_eq!(a, b);

    // Whatever changes the samples makes another file.
    let config = json!({"pad_token": "[PAD]"}).to_string();
    let model = prost::Message::encode_to_vec(&super::tokens::tiny_model(true));
    let other = folder(&[("tokenizer.model", &model), ("tokenizer_config.json", config.as_bytes())]);
    let other = Tokenizer::open(other.path()).unwrap();
    let changed = [
        load(&|spec| spec.max_length = 9, &bare(), &tokenizer),
        load(&|spec| spec.truncation = Truncation::Cut, &bare(), &tokenizer),
        load(&|spec| spec.special_tokens = SpecialTokens::Text, &bare(), &tokenizer),
        load(&|spec| spec.files.push(rows.clone()), &bare(), &tokenizer),
        load(&|_| {}, &Template::alpaca().into(), &tokenizer),
        load(&|_| {}, &bare(), &other),
    ];
    assert!(changed.iter().all(|dataset| !dataset.stats().from_cache));
    assert_eq!(n_files(), 7);
    std::fs::write(&rows, content.replace("ab", "ba")).unwrap();
    assert!(!same().stats().from_cache);
    std::fs::write(&rows, &content).unwrap();

    // A damaged file is never trusted: a byte changed, cut anywhere, another's contents.
    let path = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path());
    let path = path.max_by_key(|path| std::fs::metadata(path).unwrap().modified().unwrap()).unwrap();
    std::fs::remove_file(&path).unwrap();
    let folder_of_one = files.path().join("one");
    let load_one = || {
        Dataset::load(
            &spec(vec![rows.clone()]),
            &tokenizer,
            &bare(),
            TokenCache::Keep { folder: &folder_of_one, is_required: true, max_bytes: u64::MAX },
        )
        .unwrap()
    };
    load_one();
    let path = std::fs::read_dir(&folder_of_one).unwrap().next().unwrap().unwrap().path();
    let whole = std::fs::read(&path).unwrap();
    let replace = |bytes: &[u8]| {
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, bytes).unwrap();
    };
    for at in (0..whole.len()).step_by(7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x40;
        replace(&damaged);
        let dataset = load_one();
        assert!(!dataset.stats().from_cache, "byte {at}");
        assert_eq!(std::fs::read(&path).unwrap(), whole, "it is written anew");
    }
    for length in [0, 1, 63, 64, whole.len() - 1] {
        replace(&whole[..length]);
        assert!(!load_one().stats().from_cache, "{length} bytes");
    }
    assert!(load_one().stats().from_cache);
    assert_eq!(dump(&load_one()), dump(&first));
    assert_eq!(std::fs::read_dir(&folder_of_one).unwrap().count(), 1, "no temporary file stays");
}

#[test]
fn an_order_is_what_its_seed_has_always_meant() {
    // Computed by an independent program from the description in `order`.
    let mut order = EpochOrder::new(10, 4, true, 42);
    let steps: Vec<Vec<u32>> = (0..6).map(|step| order.step_samples(step)).collect();
    assert_eq!(steps, [vec![4, 6, 7, 0], vec![9, 5, 1, 2], vec![3, 8], vec![8, 1, 9, 3], vec![4, 0, 6, 5], vec![7, 2]]);
    assert_eq!(order.step_samples(1), steps[1], "any step can be asked for again");
    let mut plain = EpochOrder::new(5, 2, false, 42);
    assert_eq!(plain.updates_per_epoch(), 3);
    assert_eq!(
        (0..4).map(|step| plain.step_samples(step)).collect::<Vec<_>>(),
        [vec![0, 1], vec![2, 3], vec![4], vec![0, 1]]
    );

    let mut order = EpochOrder::new(1000, 64, true, 1);
    for epoch in 0..3 {
        let n = order.updates_per_epoch();
        let samples: Vec<u32> = (0..n).flat_map(|step| order.step_samples(epoch * n + step)).collect();
        assert_eq!(samples.iter().copied().collect::<BTreeSet<_>>(), (0..1000).collect(), "each sample once an epoch");
        assert!(samples.iter().zip(0..).filter(|(sample, at)| **sample == *at).count() < 20, "and well mixed");
    }
    let (train, validation) = order::split(100, 0.07, 3);
    assert_eq!((train.len(), validation.len()), (93, 7));
    assert_eq!([train.clone(), validation.clone()].concat().into_iter().collect::<BTreeSet<_>>().len(), 100);
    assert!(train.is_sorted() && validation.is_sorted() && order::split(100, 0.07, 4).1 != validation);
    assert_eq!(order::split(3, 0.01, 1).1.len(), 1);
    assert_eq!(order::split(2, 0.99, 1).0.len(), 1);
    assert_eq!(order::split(1, 0.5, 1), (vec![0], vec![]));
    assert!(order::split(9, 0.0, 1).1.is_empty());
}

#[test]
fn packing_holds_every_document_once_in_few_even_micro_batches() {
    let lengths: Vec<usize> = (0..64).map(|at| 20 + at * 7919 % 493).collect();
    let total: usize = lengths.iter().sum();
    for max_tokens in [512, 700, 1024, 4096, 1 << 20] {
        let batches = pack::micro_batches(&lengths, max_tokens);
        let mut documents: Vec<usize> = batches.concat();
        documents.sort_unstable();
        assert_eq!(documents, (0..64).collect::<Vec<_>>());
        let held: Vec<usize> = batches.iter().map(|batch| batch.iter().map(|&at| lengths[at]).sum()).collect();
        assert!(held.iter().all(|&held| held <= max_tokens), "{held:?}");
        assert!(batches.len() <= total.div_ceil(max_tokens) + 1, "{} of {max_tokens} for {total}", batches.len());
        for batch in &batches {
            assert!(batch.is_sorted_by_key(|&at| std::cmp::Reverse(lengths[at])));
        }
    }
    assert_eq!(pack::micro_batches(&[3, 3, 3, 3], 7), [[0, 2], [1, 3]], "even, not one full and one half empty");
    assert_eq!(pack::micro_batches(&[9, 1], 4), [[0], [1]]);
    assert!(pack::micro_batches(&[], 4).is_empty());
}

#[test]
fn batches_say_of_every_learned_token_where_it_is_and_what_it_weighs() {
    // Prompts of `<s>` and one or more tokens; sample 2 is cut within its prompt.
    let content = rows(&[("a", "a"), ("a", "x x"), ("x x x x x x", "a"), ("", "ab"), ("a", "")]);
    let dataset = load(&content, |spec| (spec.max_length, spec.truncation) = (8, Truncation::Cut)).unwrap();
    let labels: Vec<usize> = (0..5).map(|sample| dataset.label_tokens(sample)).collect();
    assert_eq!(labels, [2, 5, 0, 2, 1]);
    let update = [3, 2, 1, 0, 4];
    for (average, wanted) in [
        (LossAverage::Tokens, [0.1, 0.0, 0.1, 0.1, 0.1]),
        (LossAverage::Samples { group: 1 }, [1.0 / 8.0, 0.0, 1.0 / 20.0, 1.0 / 8.0, 1.0 / 4.0]),
        (LossAverage::Samples { group: 2 }, [1.0 / 6.0, 0.0, 1.0 / 21.0, 1.0 / 21.0, 1.0 / 3.0]),
        (LossAverage::Samples { group: 9 }, [0.1, 0.0, 0.1, 0.1, 0.1]),
    ] {
        for max_tokens in [8, 12, 100] {
            let batches = build_batches(&dataset, &update, average, max_tokens);
            let (mut seen, mut sum) = (BTreeSet::new(), 0.0);
            for batch in &batches {
                assert!(batch.input_ids.len() <= max_tokens);
                assert_eq!(batch.cu_seqlens.len(), batch.slots.len() + 1);
                let mut row = 0;
                for (document, &slot) in batch.slots.iter().enumerate() {
                    assert!(seen.insert(slot), "slot {slot} twice");
                    let (start, end) = (batch.cu_seqlens[document], batch.cu_seqlens[document + 1]);
                    let sample = update[slot as usize] as usize;
                    let ids: Vec<i64> = dataset.ids(sample).iter().map(|&id| i64::from(id)).collect();
                    assert_eq!(batch.input_ids[start..end], ids);
                    assert_eq!(batch.position_ids[start..end], (0..ids.len() as i64).collect::<Vec<_>>());
                    for (at, &id) in ids.iter().enumerate().skip(first_span(&dataset, sample).start) {
                        assert_eq!(batch.learned_rows[row], (start + at - 1) as i64);
                        assert_eq!(batch.targets[row], id);
                        assert!((batch.weights[row] - wanted[slot as usize]).abs() < 1e-7, "{average:?} {slot}");
                        sum += f64::from(batch.weights[row]);
                        row += 1;
                    }
                }
                assert_eq!([row, row, row], [batch.label_tokens(), batch.targets.len(), batch.weights.len()]);
            }
            assert_eq!(seen, BTreeSet::from([0, 2, 3, 4]), "what has nothing to learn is left out, with its slot");
            // Ten weights of f32, each rounded by half of 2^-24 of itself.
            assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        }
    }
    assert!(build_batches(&dataset, &[2], LossAverage::Tokens, 8).is_empty(), "an update without label tokens");
}

#[test]
fn what_was_read_leniently_is_said_and_a_broken_file_is_never_passed_over() {
    let row = |answer: &str| json!({"instruction": "q", "output": answer}).to_string();
    let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1},
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
    let earlier = json!({"messages": turns}).to_string();
    let content = format!("{}{}\n{earlier}\n{earlier}\n", row("a"), row("b"));
    let files = folder(&[("rows.jsonl", content.as_bytes())]);
    let cache = files.path().join("cache");
    for is_again in [false, true] {
        let dataset = Dataset::load(
            &spec(vec![files.path().join("rows.jsonl")]),
            &tiny(),
            &bare(),
            TokenCache::Keep { folder: &cache, is_required: true, max_bytes: u64::MAX },
        )
        .unwrap();
        assert_eq!((dataset.len(), dataset.stats().from_cache), (4, is_again));
        let told: Vec<String> = dataset.warnings().iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].contains("rows.jsonl:1: several rows stand on one line"), "{told:?}");
        assert!(told[1].contains("rows.jsonl:2: 2 rows, this is the first, ask to have an earlier"), "{told:?}");
    }
    let all: Vec<String> = (0..10).map(|_| row("a")).collect();
    for content in [format!("[{}", all.join(",\n")), format!("[{}]more", all.join(",\n"))] {
        let error = load(&content, |spec| spec.max_bad_rows = 1000).err().unwrap();
        assert_eq!((error.faults().len(), error.exit_code()), (1, 2), "{error}");
        assert!(error.faults()[0].place.ends_with("rows.jsonl:10"), "{error}");
    }
}

#[test]
fn what_a_template_file_may_not_mean_is_said() {
    let plain = ("user = [\"U \", \"\\n\"]\n", "reply = [\"A \", \"\\n\"]\n");
    for (content, wanted) in [
        (format!("start = \"<s>\"\n{}{}", plain.0, plain.1), &["start: begins with <s>"][..]),
        (format!("start = \"<s>[INST] \"\n{}{}", plain.0, plain.1), &["start: begins with <s>"]),
        (format!("user = [\"<s>U\", \"\"]\n{}", plain.1), &["user: begins with <s>"]),
        (format!("system = [\"<s>\", \"\"]\n{}{}", plain.0, plain.1), &["system: begins with <s>"]),
        (format!("end = \"A</s>\"\n{}{}", plain.0, plain.1), &["end: ends with </s>"]),
        ("user = [\"\"\"U\r\n\"\"\", \"\\n\"]\r\nreply = [\"A\", \"\"]\r\n".to_owned(), &["user: holds a carriage return"]),
        (format!("user = [\"U \", '\\n']\n{}", plain.1), &["user: holds a backslash and `n`"]),
        (format!("{}reply = ['A\\t', '\\n']\n", plain.0), &["reply: holds a backslash and `t`", "and `n`"]),
        (
            "user = [\"<|im_start|>user\\n\", \"<|im_end|>\\n\"]\nreply = [\"<|im_start|>assistant\\n\", \"<|im_end|>\\n\"]\n\
             stop = [\"<|im_end|>\"]\n"
                .to_owned(),
            &["user: holds <|im_start|>, which is no token", "user: holds <|im_end|>, which is no token"],
        ),
        (format!("user = [\"<start_of_turn>\", \"\"]\n{}", plain.1), &["user: holds <start_of_turn>"]),
        (format!("user = [\"Q: {{question}}\\n\", \"\"]\n{}", plain.1), &["user: holds {question}, which stands in every prompt as it is"]),
        (format!("{}reply = [\"A: {{{{ message.content }}}}\", \"\"]\n", plain.0), &["reply: holds {{ message.content }}, which"]),
        (format!("stop = [\"<|eot_id|>\"]\n{}{}", plain.0, plain.1), &["stop: holds <|eot_id|>"]),
        // What is as it should be: an earlier answer's end is the template's own, and other brackets are text.
        ("start = \"S <b> |x|\"\nuser = [\"[INST] \", \" [/INST] <sep>\"]\nreply = [\"\", \"</s><s>\"]\n".to_owned(), &[]),
        ("user = [\"{ \\\"q\\\": \", \" }\"]\nreply = [\"{x}\", \"{}\"]\n".to_owned(), &[]),
        (format!("{}{}", plain.0, plain.1), &[]),
    ] {
        let files = folder(&[("t 1.toml", content.as_bytes())]);
        let path = files.path().join("t 1.toml");
        let told = template_check::warnings(&Template::read(&path).unwrap(), &path, &tiny());
        let told: Vec<String> = told.iter().map(|fault| fault.in_one_line()).collect();
        assert_eq!(told.len(), wanted.len(), "{content}: {told:?}");
        for (told, wanted) in told.iter().zip(wanted) {
            assert!(told.contains("t 1.toml: ") && told.contains(wanted) && told.ends_with(')'), "{content}: {told}");
        }
        let quoted = told.iter().any(|told| told.contains("sed -i") && told.contains("t 1.toml'"));
        assert_eq!(quoted, content.contains("U\r\n"), "{told:?}");
    }
}
