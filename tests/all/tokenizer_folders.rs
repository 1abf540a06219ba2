//! Tokenizer folders: ids against those of Transformers, two tokenizers in one folder, what is warned of and what is
//! refused, what travels.
//!
//! `scripts/make_tokenizer_golden.py` made the folders and asked Transformers; each case says which version answered.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bellora::data::tokenizer::PromptPart;
use bellora::data::tokenizer::proto::{ModelProto, NormalizerProto, PieceKind, PieceProto, TrainerProto};
use bellora::data::{SpecialTokens, Tokenizer};
use bellora::formats::keys::{Effect, KeyTable};
use bellora::formats::tokenizer_keys::{ADDED_TOKENS, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, TOKENIZER_JSON};
use prost::Message;
use serde_json::{Value, json};

use crate::place::Place;
use crate::tokens::folder;

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizers/folders.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn pieces(golden: &Value) -> Vec<&str> {
    golden["pieces"].as_array().unwrap().iter().map(|piece| piece.as_str().unwrap()).collect()
}

/// The model of the script: scores that fall with the id, as Llama's.
fn model(golden: &Value) -> Vec<u8> {
    let piece = |(id, text): (u16, &&str)| {
        let kind = match id {
            0 => PieceKind::Unknown,
            1 | 2 => PieceKind::Control,
            3..259 => PieceKind::Byte,
            _ => PieceKind::Normal,
        };
        let score = if kind == PieceKind::Normal { 258.0 - f32::from(id) } else { 0.0 };
        PieceProto { piece: Some((*text).to_owned()), score: Some(score), r#type: Some(kind as i32) }
    };
    let model = ModelProto {
        pieces: (0..).zip(&pieces(golden)).map(piece).collect(),
        trainer_spec: Some(TrainerProto { model_type: Some(2), byte_fallback: Some(true), ..TrainerProto::default() }),
        normalizer_spec: Some(NormalizerProto {
            name: Some("identity".into()),
            remove_extra_whitespaces: Some(false),
            ..NormalizerProto::default()
        }),
        denormalizer_spec: None,
    };
    model.encode_to_vec()
}

/// A folder with JSON files, a tokenizer.json completed by vocabulary and merges, and perhaps the model.
fn folder_of(golden: &Value, files: &Value, has_model: bool) -> tempfile::TempDir {
    let made = folder(&[]);
    for (name, value) in files.as_object().unwrap() {
        let mut value = value.clone();
        if name == "tokenizer.json" {
            let vocab: BTreeMap<&str, usize> =
                pieces(golden).into_iter().enumerate().map(|(id, piece)| (piece, id)).collect();
            value["model"]["vocab"] = json!(vocab);
            value["model"]["merges"] = golden["merges"].clone();
        }
        std::fs::write(made.path().join(name), value.to_string()).unwrap();
    }
    if has_model {
        std::fs::write(made.path().join("tokenizer.model"), model(golden)).unwrap();
    }
    made
}

fn case<'a>(golden: &'a Value, name: &str) -> &'a Value {
    golden["cases"].as_array().unwrap().iter().find(|case| case["name"] == name).unwrap()
}

fn warnings(tokenizer: &Tokenizer) -> String {
    assert!(tokenizer.warnings().iter().all(|warning| !warning.hint.is_empty()), "{:?}", tokenizer.warnings());
    tokenizer.warnings().iter().map(|warning| format!("{warning}\n")).collect()
}

#[test]
fn ids_of_folders_are_those_of_transformers() {
    let golden = golden();
    let texts: Vec<&str> = golden["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let mut wrong = Vec::new();
    for case in golden["cases"].as_array().unwrap() {
        let (name, folder) = (&case["name"], folder_of(&golden, &case["files"], case["model"] == true));
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        for (text, ids) in texts.iter().zip(case["ids"].as_array().unwrap()) {
            let ours = tokenizer.encode(text, SpecialTokens::Special).unwrap();
            if json!(ours) != *ids {
                wrong.push(format!("{name}: {text:?} is {ours:?}, in Transformers {} {ids}", case["version"]));
            }
        }
        let (said, expected) = (warnings(&tokenizer), case["warning"].as_str().unwrap());
        if said.contains(expected) == (expected.is_empty() && !said.is_empty()) {
            wrong.push(format!("{name}: warnings {said:?}, not {expected:?}"));
        }
        // What it gives to travel makes the same tokenizer again.
        let copy = tempfile::tempdir().unwrap();
        for file in tokenizer.files() {
            std::fs::write(copy.path().join(&file.name), &file.bytes).unwrap();
        }
        let again = Tokenizer::open(copy.path()).unwrap();
        assert_eq!(
            (again.fingerprint(), again.vocab_size()),
            (tokenizer.fingerprint(), tokenizer.vocab_size()),
            "{name}"
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_a_texts_beginning_gets_a_space_where_legacy_is_false_and_the_rows_tokens_are_text() {
    let golden = golden();
    for name in ["legacy is false", "a tokenizer.json whose spaces are not those of legacy"] {
        let case = case(&golden, name);
        let folder = folder_of(&golden, &case["files"], case["model"] == true);
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let plain = |text| tokenizer.encode(text, SpecialTokens::Text).unwrap();
        let x = tokenizer.encode("<x>", SpecialTokens::Special).unwrap();
        let encode = |parts: &[(&str, bool)]| {
            let parts: Vec<_> = parts.iter().map(|&(text, of_template)| PromptPart { text, of_template }).collect();
            let mut ids = Vec::new();
            tokenizer.encode_parts(&parts, SpecialTokens::Text, &mut ids).unwrap();
            ids
        };
        // `h` is no piece with the space mark before it: behind a token the text is the same without the first id.
        let hello = tokenizer.encode("<x>user", SpecialTokens::Special).unwrap()[1..].to_vec();
        assert_ne!(plain("user"), hello, "{name}");
        assert_eq!(encode(&[("<x>", true), ("user", false)]), [x.clone(), hello].concat(), "{name}");
        assert_eq!(encode(&[("user", false), ("<x>", true)]), [plain("user"), x.clone()].concat(), "{name}");
        assert!(!encode(&[("<x>", false)]).contains(&x[0]), "{name}");
        assert_eq!(tokenizer.decode(&plain(" user")).unwrap().trim_start(), "user", "{name}");
    }
    let case = case(&golden, "no prefix space");
    let tokenizer = Tokenizer::open(folder_of(&golden, &case["files"], true).path()).unwrap();
    for text in ["user", " user", "  a"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, SpecialTokens::Text).unwrap()).unwrap(), text);
    }
}

#[test]
fn a_tokenizer_model_that_cannot_be_taken_gives_way_to_the_tokenizer_json_beside_it() {
    let golden = golden();
    let files = &case(&golden, "both, the same")["files"];
    let made = folder_of(&golden, files, false);
    let alone = Tokenizer::open(made.path()).unwrap();
    std::fs::write(made.path().join("tokenizer.model"), b"IQ== 0\nIg== 1\n").unwrap();
    let both = Tokenizer::open(made.path()).unwrap();
    let encode = |tokenizer: &Tokenizer| tokenizer.encode("a <x> user", SpecialTokens::Special).unwrap();
    assert_eq!(encode(&both), encode(&alone));
    assert!(warnings(&both).contains("is not a SentencePiece model"), "{}", warnings(&both));

    std::fs::write(made.path().join("tokenizer.model"), model(&golden)).unwrap();
    std::fs::write(made.path().join("tokenizer.json"), b"{").unwrap();
    let error = Tokenizer::open(made.path()).err().unwrap();
    assert!(error.to_string().contains("tokenizer.json: is not a tokenizer.json"), "{error}");

    // Scores in another order than the merges of a conversion: pieces are the same, ids of texts are not.
    let mut other = ModelProto::decode(&model(&golden)[..]).unwrap();
    let n_pieces = other.pieces.len();
    for (at, piece) in other.pieces.iter_mut().enumerate().skip(259) {
        piece.score = Some(-((n_pieces - at) as f32));
    }
    let files: Value =
        json!({"tokenizer.json": files["tokenizer.json"], "tokenizer_config.json": files["tokenizer_config.json"]});
    let made = folder_of(&golden, &files, false);
    std::fs::write(made.path().join("tokenizer.model"), other.encode_to_vec()).unwrap();
    let both = Tokenizer::open(made.path()).unwrap();
    assert!(warnings(&both).contains("in the one and"), "{}", warnings(&both));
    assert_eq!(encode(&both), encode(&alone));
}

/// The warnings and the ids of `a <x> user` of a folder with this `tokenizer_config.json`.
fn with_config(golden: &Value, changes: Value) -> bellora::error::Result<Tokenizer> {
    let mut files = json!({"tokenizer_config.json": case(golden, "legacy")["files"]["tokenizer_config.json"]});
    for (key, value) in changes.as_object().unwrap() {
        files["tokenizer_config.json"][key] = value.clone();
    }
    Tokenizer::open(folder_of(golden, &files, true).path())
}

#[test]
fn keys_that_are_not_honoured_are_named_and_those_of_public_folders_are_known() {
    let golden = golden();
    let said = |changes: Value| warnings(&with_config(&golden, changes).unwrap());
    // As public folders of Llama's family have them.
    let usual = json!({
        "add_eos_token": false, "add_prefix_space": true, "additional_special_tokens": [], "auto_map": null, "backend": "tokenizers",
        "chat_template": "{{ messages }}", "clean_up_tokenization_spaces": false, "errors": "replace", "extra_special_tokens": {},
        "fill_token": "<FILL_ME>", "is_local": true, "legacy": true, "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1e30, "name_or_path": "x", "pad_token": null, "padding_side": "left", "processor_class": "X",
        "sp_model_kwargs": {"enable_sampling": false}, "spaces_between_special_tokens": false, "special_tokens_map_file": "x",
        "split_special_tokens": false, "suffix_first": false, "tokenizer_file": "x", "trust_remote_code": true,
        "unsloth_version": "1", "use_default_system_prompt": false, "use_fast": true, "middle_token": "tool", "image_token": null,
    });
    assert_eq!(said(usual), "");
    for (changes, expected) in [
        (json!({"reverse_digits": true}), "tokenizer_config.json: reverse_digits: is not known"),
        (json!({"add_eos_token": true}), "tokenizer_config.json: add_eos_token"),
        (json!({"image_token": "<image>"}), "image_token: names `<image>`"),
        (json!({"tokenizer_class": "BaichuanTokenizer"}), "tokenizer_class: is BaichuanTokenizer"),
        (
            json!({"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", null]}}),
            "auto_map: names the Python code tokenization_x.X",
        ),
        (json!({"added_tokens_decoder": {"400": {"content": "<x>", "special": true}}}), "number `<x>` as 400"),
        (json!({"eos_token": null}), "eos_token: is null, and answers are trained to end in a token: </s> is taken"),
    ] {
        assert!(said(changes).contains(expected), "no warning: {expected}");
    }
    // A token that only the vocabulary holds is special under any key of the model's own.
    let tokenizer = with_config(&golden, json!({"middle_token": "tool"})).unwrap();
    assert!(tokenizer.special_tokens().values().any(|token| token == "tool"));

    // As Transformers has it, 5.23: a name that is null is no name, and one that is absent is the usual one.
    let bos = |token: Value| with_config(&golden, json!({"bos_token": token})).unwrap().bos();
    assert_eq!((bos(json!("<s>")), bos(Value::Null)), (Some(1), None));

    for table in [&TOKENIZER_CONFIG, &SPECIAL_TOKENS_MAP, &ADDED_TOKENS, &TOKENIZER_JSON] as [&KeyTable; 4] {
        let mut names: Vec<&str> = table.keys.iter().map(|key| key.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "a key stands twice in the table of {}", table.file);
    }
    assert_eq!(TOKENIZER_CONFIG.find("eot_token").unwrap().effect, Effect::Honoured);
}

#[test]
fn settings_that_would_change_ids_and_values_of_the_wrong_type_are_refused_by_name() {
    let golden = golden();
    for (changes, expected) in [
        (json!({"split_special_tokens": true}), "split_special_tokens: special tokens as plain text"),
        (json!({"do_lower_case": true}), "do_lower_case"),
        (
            json!({"sp_model_kwargs": {"enable_sampling": true, "alpha": 0.1}}),
            "sp_model_kwargs: enable_sampling is true",
        ),
        (json!({"sp_model_kwargs": [1]}), "sp_model_kwargs: is [1], not an object"),
        (json!({"tokenizer_class": "ChatGLM4Tokenizer"}), "puts [gMASK]"),
        (json!({"tokenizer_class": 3}), "tokenizer_class: is 3"),
        (json!({"legacy": "false"}), "legacy: is \"false\", not true or false"),
        (json!({"add_prefix_space": 0}), "add_prefix_space: is 0"),
        (json!({"add_bos_token": "yes"}), "add_bos_token: is \"yes\""),
        (json!({"eos_token": 2}), "eos_token: is 2, not a token"),
        (json!({"eos_token": {"content": "</s>", "lstrip": "no"}}), "eos_token: lstrip: is \"no\""),
        (json!({"additional_special_tokens": "<x>"}), "additional_special_tokens: is \"<x>\", not a list"),
        (json!({"extra_special_tokens": [1]}), "extra_special_tokens: is 1"),
        (json!({"added_tokens_decoder": ["<x>"]}), "added_tokens_decoder: is [\"<x>\"]"),
        (json!({"added_tokens_decoder": {"9": {"content": 3}}}), "bad entry `9`"),
    ] {
        let error = with_config(&golden, changes).err().unwrap_or_else(|| panic!("taken: {expected}"));
        assert!(error.to_string().contains(expected), "{error} (expected: {expected})");
        assert!(error.to_string().contains("tokenizer_config.json"), "{error}");
        assert_eq!(error.exit_code(), 2);
        assert!(error.faults().iter().all(|fault| !fault.hint.is_empty()), "no hint: {error}");
    }
}

#[test]
fn a_model_file_named_by_itself_says_what_is_not_read_beside_it() {
    let golden = golden();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.model");
    std::fs::write(&path, model(&golden)).unwrap();
    assert_eq!(warnings(&Tokenizer::open(&path).unwrap()), "");
    std::fs::write(folder.path().join("tokenizer_config.json"), "{}").unwrap();
    let warned = warnings(&Tokenizer::open(&path).unwrap());
    assert!(
        warned.contains("tokenizer.model") && warned.contains("without tokenizer_config.json beside it"),
        "{warned}"
    );
}

#[test]
fn what_lies_beside_a_tokenizer_travels_but_decides_no_ids() {
    let golden = golden();
    let beside = ["chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt"];
    for (name, opened_as) in
        [("legacy", ""), ("a tokenizer.json as it is", ""), ("a tokenizer.json as it is", "tokenizer.json")]
    {
        let case = case(&golden, name);
        let made = folder_of(&golden, &case["files"], case["model"] == true);
        let open = || Tokenizer::open(&PathBuf::from(made.path()).join(opened_as)).unwrap();
        let before = open();
        for name in beside {
            std::fs::write(made.path().join(name), name).unwrap();
        }
        std::fs::write(made.path().join("README.md"), "not the tokenizer's").unwrap();
        let after = open();
        assert_eq!(after.fingerprint(), before.fingerprint());
        let names: Vec<&str> = after.files().iter().map(|file| file.name.as_str()).collect();
        assert!(beside.iter().all(|name| names.contains(name)) && !names.contains(&"README.md"), "{names:?}");
        assert_eq!(warnings(&after), "");
        std::fs::create_dir(made.path().join("additional_chat_templates")).unwrap();
        assert!(warnings(&open()).contains("additional_chat_templates"));
    }
}

#[test]
fn a_link_to_a_file_that_is_gone_is_a_fault_of_the_folder() {
    let golden = golden();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        let made = folder_of(&golden, &json!({}), true);
        std::os::unix::fs::symlink("gone", made.path().join(name)).unwrap();
        let error = Tokenizer::open(made.path()).err().unwrap().to_string();
        assert!(error.contains(name) && error.contains("is a link to a file that is not there"), "{error}");
    }
}

#[test]
fn check_says_the_warnings_and_a_chat_template_reaches_adapter_and_merged_model() {
    let place = Place::new();
    place.write_config();
    place.write("tokenizer/chat_template.jinja", "{{ messages }}");
    place.edit_json("tokenizer/tokenizer_config.json", &json!({"reverse_digits": true}));
    let checked = place.run(&["check", "c.toml"]).ok();
    assert!(checked.stderr.contains("reverse_digits") || checked.stdout.contains("reverse_digits"), "{checked:?}");
    let trained = place.run(&["train", "c.toml"]).ok();
    assert!(trained.stderr.contains("reverse_digits"), "{trained:?}");
    place.run(&["export", "run", "--format", "merged", "--out", "merged"]).ok();
    for folder in ["run/adapter", "merged"] {
        let copied = std::fs::read(place.path(folder).join("chat_template.jinja")).unwrap();
        assert_eq!(copied, b"{{ messages }}", "{folder}");
    }
}
