//! Conversations: chat templates as Transformers renders them, and which of their tokens are learned.

use std::collections::BTreeMap;

use bellora::data::chat::{Answers, ChatSource, ChatTemplate, Rendered};
use bellora::data::conversation::Conversation;
use bellora::data::reason::Reason;
use bellora::data::rows::RowFile;
use bellora::data::{SpecialTokens, Template, TemplateFile, Tokenizer};
use serde_json::{Value, json};

use crate::support::{Lab, Shape};
use crate::tokens::{folder, tiny};

/// ChatML, as Qwen2.5 writes it without a system prompt of its own.
const CHATML: &str = "\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

/// The system prompt stands before the last question alone, so that it is not in a conversation that ends in an answer; a space goes
/// before each answer.
const INST: &str = "\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{% endif %}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content']|trim + eos_token }}
    {%- else %}{{- raise_exception('only users and assistants, not ' + message['role']) }}{% endif %}
{%- endfor %}";

/// What was thought stands in the last answer alone.
const THINKING: &str = "\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set answer = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' + message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
        {{- answer }}
    {%- else %}{{- message.content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}";

fn template(text: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let special_tokens: BTreeMap<String, String> =
        tokens.into_iter().map(|(name, token)| (name.into(), token.into())).collect();
    ChatTemplate::new(ChatSource { chat_template: text.into(), special_tokens }, "t.jinja").unwrap()
}

/// The conversation of a row.
fn row(row: &Value) -> Result<Conversation, Reason> {
    let folder = folder(&[("rows.jsonl", row.to_string().as_bytes())]);
    RowFile::read(&folder.path().join("rows.jsonl")).unwrap().conversation(0)
}

fn messages(turns: &[(&str, &str)]) -> Value {
    json!({ "messages": turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect::<Vec<_>>() })
}

/// The learned parts of a conversation's text.
fn learned(template: &str, of: &Value, answers: Answers) -> Vec<String> {
    let Rendered { text, learned, .. } = self::template(template).learned(&row(of).unwrap(), answers).unwrap();
    learned.into_iter().map(|part| text[part].to_owned()).collect()
}

const TURNS: [(&str, &str); 5] =
    [("system", "Sys"), ("user", "hi"), ("assistant", " hello\n"), ("user", "2"), ("assistant", "two")];

#[test]
fn a_chat_template_is_rendered_as_its_own_text_says() {
    let conversation = row(&messages(&TURNS)).unwrap();
    let whole = template(CHATML).learned(&conversation, Answers::All).unwrap();
    assert_eq!(
        whole.text,
        "<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n hello\n<|im_end|>\n\
         <|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    );
    assert!(!whole.lacks_text);
    let asked = Conversation::question("q");
    assert_eq!(template(CHATML).prompt(&asked).unwrap(), "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(template(CHATML).end_of_turn(), "<|im_end|>");
    assert_eq!(template(INST).end_of_turn(), "</s>");
    assert_eq!(template(INST).prompt(&asked).unwrap(), "<s>[INST] q[/INST]");
}

#[test]
fn an_answer_is_learned_from_its_prompt_to_the_token_that_ends_it() {
    let turns = messages(&TURNS);
    assert_eq!(learned(CHATML, &turns, Answers::All), [" hello\n<|im_end|>", "two<|im_end|>"]);
    assert_eq!(learned(CHATML, &turns, Answers::Last), ["two<|im_end|>"]);
    // The end of a turn within an answer, and within a question, ends nothing.
    let tricky = messages(&[
        ("user", "a"),
        ("assistant", "b<|im_end|>c"),
        ("user", "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", ""),
    ]);
    assert_eq!(learned(CHATML, &tricky, Answers::All), ["b<|im_end|>c<|im_end|>", "<|im_end|>"]);
    // Equal answers are told apart by where they stand.
    let equal = messages(&[("user", "x"), ("assistant", "x"), ("user", "x"), ("assistant", "x")]);
    let found = template(CHATML).learned(&row(&equal).unwrap(), Answers::All).unwrap();
    assert_eq!(found.learned.iter().map(|part| part.start).collect::<Vec<_>>(), [51, 114]);
}

#[test]
fn a_template_that_rewrites_what_came_before_is_followed() {
    // The system prompt is dropped: it is told, and the space before the answer is learned as without it.
    let found = template(INST).learned(&row(&messages(&TURNS)).unwrap(), Answers::All).unwrap();
    assert!(found.lacks_text && !found.text.contains("Sys"), "{found:?}");
    assert_eq!(learned(INST, &messages(&TURNS), Answers::All), [" hello</s>", " two</s>"]);
    assert_eq!(learned(INST, &messages(&TURNS[1..]), Answers::All), [" hello</s>", " two</s>"]);
    // What was thought is learned in the last answer, and is in no other.
    let thought = messages(&[
        ("user", "a"),
        ("assistant", "<think>\nhm\n</think>\n\nb"),
        ("user", "c"),
        ("assistant", "<think>\nso\n</think>\n\nd"),
    ]);
    let wanted = ["b<|im_end|>", "<think>\nso\n</think>\n\nd<|im_end|>"];
    assert_eq!(learned(THINKING, &thought, Answers::All), wanted);
    assert_eq!(learned(THINKING, &thought, Answers::Last), wanted[1..]);
}

#[test]
fn generation_marks_say_what_is_learned() {
    let marked = "\
{% for message in messages %}
{% if message.role == 'assistant' %}
A:{% generation %}{{ message.content }}!{% endgeneration %}

{% else %}
U:{{ message.content }}

{% endif %}
{% endfor %}";
    let found = template(marked).learned(&row(&messages(&TURNS[1..])).unwrap(), Answers::All).unwrap();
    assert_eq!(found.text, "U:hi\n\nA: hello\n!\nU:2\n\nA:two!\n");
    assert_eq!(learned(marked, &messages(&TURNS[1..]), Answers::All), [" hello\n!", "two!"]);
    assert_eq!(learned(marked, &messages(&TURNS[1..]), Answers::Last), ["two!"]);
}

#[test]
fn a_turn_that_is_not_to_be_learned_is_context() {
    let mut turns = messages(&TURNS[1..]);
    turns["messages"][1]["weight"] = json!(0);
    assert_eq!(learned(CHATML, &turns, Answers::All), ["two<|im_end|>"]);
    turns["messages"][1]["weight"] = json!(1);
    turns["messages"][3]["train"] = json!(false);
    assert_eq!(learned(CHATML, &turns, Answers::All), [" hello\n<|im_end|>"]);
    let refused = template(CHATML).learned(&row(&turns).unwrap(), Answers::Last).unwrap_err();
    assert!(refused.what.contains("not to be learned"), "{refused:?}");
    turns["messages"][0]["weight"] = json!(1);
    assert!(row(&turns).unwrap_err().what.contains("turn 1 of `messages` is to be learned"));
}

#[test]
fn rows_of_every_format_become_messages() {
    let wanted = row(&messages(&TURNS[1..])).unwrap();
    let sharegpt = json!({"conversations": [
        {"from": "human", "value": "hi"}, {"from": "gpt", "value": " hello\n"},
        {"from": "user", "value": "2"}, {"from": "assistant", "value": "two"}]});
    assert_eq!(row(&sharegpt).unwrap(), wanted);
    let alpaca = json!({"instruction": "2", "output": "two", "history": [["hi", " hello\n"]], "id": 7});
    let found = row(&alpaca).unwrap();
    assert_eq!((found.messages, found.passed_over), (wanted.messages.clone(), vec!["id".to_owned()]));
    let with_input = row(&json!({"instruction": "a", "input": "b", "output": "c", "system": "S"})).unwrap();
    assert_eq!(
        with_input.messages,
        row(&messages(&[("system", "S"), ("user", "a\nb"), ("assistant", "c")])).unwrap().messages
    );
    // Keys that are null are left out; unknown ones, and tools, reach the template.
    let tools = row(&json!({"tools": "[{\"a\": 1}]", "messages": [
        {"role": "user", "content": "q", "name": null},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "x"}], "reasoning_content": "r"}]}));
    let tools = tools.unwrap();
    assert_eq!(tools.tools, Some(json!([{"a": 1}])));
    assert_eq!(tools.messages[0], json!({"role": "user", "content": "q"}));
    assert_eq!(tools.messages[1], json!({"role": "assistant", "tool_calls": [{"id": "x"}], "reasoning_content": "r"}));
}

#[test]
fn rows_that_are_no_conversation_are_bad_by_what_they_are() {
    let refused = |of: Value| {
        let row = row(&of);
        row.and_then(|row| template(INST).learned(&row, Answers::All).map(|_| ())).unwrap_err().what
    };
    for (of, words) in [
        (json!({"messages": "hi"}), "must be a list of turns"),
        (json!({"messages": []}), "no answer of an assistant"),
        (json!({"messages": [3]}), "turn 1 of `messages` must be an object"),
        (json!({"messages": [{"content": "a"}]}), "has no `from` (or `role`)"),
        (json!({"messages": [{"role": "user"}]}), "has no `value` (or `content`)"),
        (json!({"messages": [{"role": "user", "content": 3}]}), "has a number as `content`"),
        (json!({"messages": [], "conversations": []}), "both `conversations` and `messages`"),
        (json!({"messages": [], "instruction": "a"}), "both a dialogue and an `instruction`"),
        (json!({"other": 1}), "no known format"),
        (json!({"weight": 0, "messages": []}), "not to be learned"),
        (json!({"messages": [], "images": ["a.png"]}), "text alone"),
        (json!({"messages": [], "functions": [{"name": "f"}]}), "holds `functions`"),
        (json!({"messages": [], "reasoning_content": "hm"}), "holds `reasoning_content`"),
        (messages(&TURNS[..2]), "no answer of an assistant"),
        (messages(&TURNS[1..4]), "ends with a user turn"),
        (messages(&[("user", "a"), ("tool", "b"), ("assistant", "c")]), "only users and assistants, not tool"),
    ] {
        let found = refused(of.clone());
        assert!(found.contains(words), "{of}: {found}");
    }
}

#[test]
fn values_are_written_as_python_writes_them() {
    let of = json!({"tools": [{"n": "é<", "x": 1.5, "y": [true, null]}], "messages": [
        {"role": "user", "content": "q", "extra": {"a": [true, null, "it's"]}}, {"role": "assistant", "content": "a"}]});
    let text = |template: &str| self::template(template).learned(&row(&of).unwrap(), Answers::Last).unwrap().text;
    let behind = "{{ messages[1].content }}";
    for (template, wanted) in [
        ("{{ tools | tojson }}", r#"[{"n": "é<", "x": 1.5, "y": [true, null]}]"#),
        (
            "{{ tools[0] | tojson(indent=2) }}",
            "{\n  \"n\": \"é<\",\n  \"x\": 1.5,\n  \"y\": [\n    true,\n    null\n  ]\n}",
        ),
        ("{{ messages[0].extra }}", "{'a': [True, None, \"it's\"]}"),
        ("{{ true }}{{ none }}{{ nothing }}{{ 1 + 1 }}", "TrueNone2"),
        ("{{ 'a' + 3|string }}", "a3"),
        ("{{ 'A b'.lower().split(' ')|join('-') }}{{ ' x '.strip() }}", "a-bx"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "assistant"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ messages[-1]['role'][:3] }}{{ messages[::-1][0].role }}", "assassistant"),
        ("{{ strftime_now('%Y')|length }}", "4"),
    ] {
        assert_eq!(text(&format!("{template}{behind}")), format!("{wanted}a"), "{template}");
    }
}

#[test]
fn a_mistake_in_a_template_is_named_with_its_line_and_column() {
    let source = ChatSource { chat_template: "a\n{% if %}\n".into(), special_tokens: BTreeMap::new() };
    let error = ChatTemplate::new(source, "x/t.jinja").unwrap_err();
    assert_eq!(error.exit_code(), 2);
    for broken in ["{%}", "{%", "%}{%-%}"] {
        let source = ChatSource { chat_template: broken.into(), special_tokens: BTreeMap::new() };
        assert_eq!(ChatTemplate::new(source, "x/t.jinja").unwrap_err().exit_code(), 2, "{broken}");
    }
    assert!(error.to_string().contains("x/t.jinja: ") && error.to_string().contains("line 2, column 7: "), "{error}");
    // A column counts characters; on a line with marks, which are put in place of its tags, there is the line alone.
    for (broken, at) in
        [("é{{ 1 + }}", "line 1, column 9: "), ("\n{% generation %}{{ 1 + }}{% endgeneration %}", "line 2: ")]
    {
        let source = ChatSource { chat_template: broken.into(), special_tokens: BTreeMap::new() };
        let error = ChatTemplate::new(source, "x/t.jinja").unwrap_err().to_string();
        assert!(error.contains(at), "{broken}: {error}");
    }
}

#[test]
fn offsets_go_with_the_ids_and_cover_the_text() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/attention_rslora_uneven/tokenizer");
    let tokenizers = [tiny(), Tokenizer::open(std::path::Path::new(golden)).unwrap()];
    let texts = ["", "ab", " abc  x", "你好é</s>ab", "<s>a</s> b\n\n好好x", "caab</s></s> ", "Hello, 世界 🙂!"];
    for (tokenizer, text) in tokenizers.iter().flat_map(|one| texts.map(|text| (one, text))) {
        let found = tokenizer.encode_with_offsets(text).unwrap();
        let ids: Vec<u32> = found.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, tokenizer.encode(text, SpecialTokens::Special).unwrap(), "{text:?}");
        let mut covered = 0;
        for (id, part) in &found {
            assert!(part.start <= covered && part.end >= part.start, "{text:?}: {id} at {part:?}, {covered} covered");
            covered = covered.max(part.end);
        }
        assert_eq!(covered, text.len(), "{text:?}: {found:?}");
    }
    // Each piece by itself: a dummy prefix stands for nothing, nor does a byte before the last of its character.
    let parts = |text: &str| -> Vec<(usize, usize)> {
        tiny().encode_with_offsets(text).unwrap().into_iter().map(|(_, part)| (part.start, part.end)).collect()
    };
    assert_eq!(parts("ab</s>é"), [(0, 2), (2, 6), (6, 6), (6, 6), (6, 8)]);
}

/// A lab whose tokenizer has a chat template, and whose rows are conversations.
fn lab() -> Lab {
    let lab = Lab::new(Shape::default());
    let path = lab.path("base/tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["chat_template"] = INST.into();
    std::fs::write(&path, config.to_string()).unwrap();
    let conversation = |n: usize| {
        let turns: Vec<(String, String)> =
            (0..n % 3 + 1).map(|turn| (format!("q {n} {turn}"), format!("a {turn}"))).collect();
        let turns: Vec<(&str, &str)> =
            turns.iter().flat_map(|(q, a)| [("user", q.as_str()), ("assistant", a.as_str())]).collect();
        messages(&turns).to_string() + "\n"
    };
    std::fs::write(lab.path("rows.jsonl"), (0..12).map(conversation).collect::<String>()).unwrap();
    lab.with(&["data.template=chat"])
}

#[test]
fn a_run_learns_every_answer_and_generates_by_its_own_template() {
    let lab = lab();
    let check = lab.run("check", &[], &[]).ok();
    assert!(check.stdout.contains("[INST] q 0 0[/INST]⟦ a 0</s>⟧"), "{}", check.stdout);
    let counted = |more: &[&str]| {
        let dump = lab.path("dump.jsonl");
        lab.run("prepare", &["--dump", dump.to_str().unwrap()], more).ok();
        let text = std::fs::read_to_string(&dump).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .map(|line| line["labels"].as_array().unwrap().iter().filter(|label| **label == 2).count())
            .collect::<Vec<_>>()
    };
    // Each learned answer ends in </s>, which is token 2.
    assert_eq!(counted(&[]), [1, 2, 3].repeat(4));
    assert_eq!(counted(&["data.learn=last"]), [1; 12]);

    lab.run("train", &[], &["train.max_steps=2", "train.checkpoint_every=1"]).ok();
    let adapter = lab.path("run/adapter");
    let file = TemplateFile::load(&adapter).unwrap().unwrap();
    assert_eq!(file.stop_token_ids, [2]);
    let messages_file = lab.path("messages.json");
    std::fs::write(&messages_file, messages(&TURNS[1..4]).to_string()).unwrap();
    let answer = |arguments: &[&str]| {
        let mut command = crate::support::bellora();
        command.args(["generate", adapter.to_str().unwrap(), "--max-new-tokens", "4"]).args(arguments);
        crate::support::run(&mut command)
    };
    answer(&["--messages", messages_file.to_str().unwrap()]).ok();
    answer(&["--prompt", "hi", "--system", "S"]).ok();
    let refused = answer(&["--messages", lab.path("rows.jsonl").to_str().unwrap()]);
    assert!(refused.code == Some(2) && refused.stderr.contains("is not valid JSON"), "{}", refused.stderr);
    assert_eq!(answer(&[]).code, Some(2));
    // Messages that are answered already: the file is named.
    std::fs::write(&messages_file, messages(&TURNS[1..3]).to_string()).unwrap();
    let refused = answer(&["--messages", messages_file.to_str().unwrap()]);
    assert!(refused.code == Some(2) && refused.stderr.contains("end with an answer"), "{}", refused.stderr);
    assert!(refused.stderr.contains("messages.json"), "{}", refused.stderr);
    // A resumed run wants the same answers learned.
    let resumed = lab.run("train", &["--resume"], &["train.max_steps=3", "data.learn=last"]);
    assert!(resumed.code == Some(2) && resumed.stderr.contains("data.learn"), "{}", resumed.stderr);
    lab.run("train", &["--resume"], &["train.max_steps=3"]).ok();
}

#[test]
fn what_a_template_leaves_out_or_lacks_is_said() {
    let lab = lab();
    let with_system = messages(&TURNS[..3]).to_string() + "\n";
    std::fs::write(lab.path("rows.jsonl"), with_system.repeat(3)).unwrap();
    let check = lab.run("check", &[], &[]).ok();
    assert!(
        check.stdout.contains("rows.jsonl:1: 3 rows, this is the first, hold text that the chat template leaves out"),
        "{}",
        check.stdout
    );
    let none = Lab::new(Shape::default()).run("check", &[], &["data.template=chat"]);
    assert!(none.code == Some(2) && none.stderr.contains("there is no chat template beside"), "{}", none.stderr);
    std::fs::write(lab.path("t.jinja"), "{% for %}").unwrap();
    let set = format!("data.template={}", lab.path("t.jinja").display());
    let mistake = lab.run("check", &[], &[&set]);
    assert!(mistake.code == Some(2) && mistake.stderr.contains("t.jinja: the chat template"), "{}", mistake.stderr);
    let text = lab.run("check", &[], &["data.special_tokens=text"]);
    assert!(text.code == Some(2) && text.stderr.contains("data.special_tokens"), "{}", text.stderr);
}

#[test]
fn strings_around_turns_learn_every_answer_too() {
    let lab = Lab::new(Shape::default());
    let rows = messages(&TURNS[1..]).to_string() + "\n";
    std::fs::write(lab.path("rows.jsonl"), rows).unwrap();
    std::fs::write(lab.path("t.toml"), "user = [\"U:\", \"\\n\"]\nreply = [\"A:\", \"</s>\\n\"]\n").unwrap();
    let set = format!("data.template={}", lab.path("t.toml").display());
    assert!(Template::read(&lab.path("t.toml")).is_ok());
    let shown = |more: &str| lab.run("check", &[], &[&set, more]).ok().stdout;
    assert!(
        shown("data.learn=all").contains("U:hi\nA:⟦ hello\n</s>⟧\nU:2\nA:⟦two</s>⟧"),
        "{}",
        shown("data.learn=all")
    );
    assert!(
        shown("data.learn=auto").contains("U:hi\nA: hello\n</s>\nU:2\nA:⟦two</s>⟧"),
        "{}",
        shown("data.learn=auto")
    );
}

/// Where an answer has no token that ends it, what follows is not learned, and one that is left out is told.
#[test]
fn an_answer_without_an_end_of_its_own_ends_where_the_next_message_begins() {
    let bare = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    assert_eq!(template(bare).end_of_turn(), "");
    assert_eq!(learned(bare, &messages(&TURNS[1..]), Answers::All), [" hello\n", "two"]);
    // The first answer has no such token, and that of another turn is not taken for it.
    let last_only = "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% if loop.last %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}";
    assert_eq!(learned(last_only, &messages(&TURNS[1..]), Answers::Last), ["two</s>"]);
    let first = learned(last_only, &messages(&TURNS[1..]), Answers::All);
    assert!(first[0].starts_with(" hello") && first[1] == "two</s>", "{first:?}");
    let drops = "{% for m in messages if m.role == 'user' %}U{{ m.content }}{% endfor %}";
    let refused = template(drops).learned(&row(&messages(&TURNS[1..])).unwrap(), Answers::All).unwrap_err();
    assert!(refused.what.contains("turn 2 cannot be found") && !refused.hint.is_empty(), "{refused:?}");
}

#[test]
fn messages_that_cannot_be_asked_are_refused() {
    let asked = |of: Value| Conversation::of_turns(&of["messages"], "messages").unwrap().asked().unwrap_err().what;
    assert!(asked(messages(&TURNS[1..3])).contains("do not end with a question"));
    let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]});
    assert!(asked(parts).contains("message 1 is no text"));
    let with_tools = Conversation { tools: Some(json!([1])), ..Conversation::question("q") };
    assert!(with_tools.asked().unwrap_err().what.contains("tools"));
}
