//! Tokenizers: SentencePiece models against values that Python's sentencepiece gave, special tokens, tokenizer.json, and
//! what is refused.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bellora::data::tokenizer::PromptPart;
use bellora::data::tokenizer::proto::{ModelProto, NormalizerProto, PieceKind, PieceProto, TrainerProto};
use bellora::data::{
    Answers, DataSpec, Dataset, Prompting, SpecialTokens, Template, TokenCache, Tokenizer, Truncation,
};
use prost::Message;
use serde_json::{Value, json};

/// A small BPE model: ties in score, a user-defined piece, a character (`你`) that occurs in pieces without being one, and,
/// where asked for, the 256 byte pieces.
pub(crate) fn tiny_model(byte_fallback: bool) -> ModelProto {
    let mut pieces = vec![("<unk>", 0.0, PieceKind::Unknown), ("<s>", 0.0, PieceKind::Control)];
    pieces.extend([("</s>", 0.0, PieceKind::Control), ("<sep>", 0.0, PieceKind::UserDefined)]);
    let normal = [("ab", 0.0), ("bc", 0.0), ("ca", 0.0), ("aa", 0.0), ("abc", -1.0), ("▁a", -2.0), ("你好", -3.0)];
    let more = [("▁▁", -4.0), ("▁ab", -0.5), ("aaaa", -1.0), ("caab", -1.0), ("好好", 0.0), ("▁你好", -3.5)];
    let letters = [("▁", -9.0), ("a", -9.0), ("b", -9.0), ("c", -9.0), ("好", -9.0), ("x", -9.0), ("\n", -9.0)];
    for list in [&normal[..], &more[..], &letters[..]] {
        pieces.extend(list.iter().map(|&(text, score)| (text, score, PieceKind::Normal)));
    }
    let mut pieces: Vec<_> = pieces.into_iter().map(|(text, score, kind)| (text.to_owned(), score, kind)).collect();
    if byte_fallback {
        pieces.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 0.0, PieceKind::Byte)));
    }
    let piece = |(text, score, kind): (String, f32, PieceKind)| PieceProto {
        piece: Some(text),
        score: Some(score),
        r#type: Some(kind as i32),
    };
    ModelProto {
        pieces: pieces.into_iter().map(piece).collect(),
        trainer_spec: Some(TrainerProto {
            model_type: Some(2),
            byte_fallback: Some(byte_fallback),
            ..TrainerProto::default()
        }),
        normalizer_spec: Some(NormalizerProto {
            name: Some("identity".into()),
            remove_extra_whitespaces: Some(false),
            ..NormalizerProto::default()
        }),
        denormalizer_spec: None,
    }
}

/// A folder with files, gone at the end of the test.
pub(crate) fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn open_with(model: &ModelProto, files: &[(&str, Value)]) -> bellora::error::Result<Tokenizer> {
    let folder = folder(&[("tokenizer.model", &model.encode_to_vec())]);
    for (name, json) in files {
        std::fs::write(folder.path().join(name), json.to_string()).unwrap();
    }
    Tokenizer::open(folder.path())
}

pub(crate) fn tiny() -> Tokenizer {
    open_with(&tiny_model(true), &[]).unwrap()
}

fn refusal(result: bellora::error::Result<Tokenizer>) -> String {
    let error = result.err().expect("this must be refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.faults().iter().all(|fault| !fault.hint.is_empty()), "no hint: {error}");
    error.to_string()
}

/// What sentencepiece 0.2 (Python) gave for `tiny_model(true)` and `tiny_model(false)`.
#[rustfmt::skip]
const PYTHON: &[(&str, &[u32], &[u32])] = &[
    ("", &[], &[]),
    ("a", &[9], &[9]),
    ("ab", &[12], &[12]),
    ("abc", &[12, 20], &[12, 20]),
    ("aabc", &[17, 7, 5], &[17, 7, 5]),
    ("abcab", &[12, 6, 19], &[12, 6, 19]),
    ("caab", &[17, 14], &[17, 14]),
    ("caabc", &[17, 14, 20], &[17, 14, 20]),
    ("aaaaa", &[17, 13, 18], &[17, 13, 18]),
    ("bcab bc", &[17, 5, 4, 17, 5], &[17, 5, 4, 17, 5]),
    ("  ab", &[11, 12], &[11, 12]),
    (" ", &[11], &[11]),
    ("a<sep>b", &[9, 3, 19], &[9, 3, 19]),
    ("<sep> <sep>", &[17, 3, 17, 3], &[17, 3, 17, 3]),
    ("x<sep", &[17, 22, 84, 139, 125, 136], &[17, 22, 0]),
    ("ab<sep>abc ab", &[12, 3, 8, 12], &[12, 3, 8, 12]),
    ("你好", &[16], &[16]),
    ("好好好", &[17, 15, 21], &[17, 15, 21]),
    ("你", &[17, 252, 213, 184], &[17, 0]),
    ("x你x", &[17, 22, 252, 213, 184, 22], &[17, 22, 0, 22]),
    ("你好你好", &[16, 10], &[16, 10]),
    ("zz z", &[17, 146, 146, 17, 146], &[17, 0, 17, 0]),
    ("zéz", &[17, 146, 219, 193, 146], &[17, 0]),
    ("a\nb", &[9, 23, 19], &[9, 23, 19]),
    ("</s>", &[17, 84, 71, 139, 86], &[17, 0]),
    ("<s>a", &[17, 84, 139, 86, 18], &[17, 0, 18]),
    ("<0x41>", &[17, 84, 72, 22, 76, 73, 86], &[17, 0, 22, 0]),
    ("▁a", &[17, 9], &[17, 9]),
    ("a\0b", &[9, 24, 19], &[9, 0, 19]),
    ("𠮷", &[17, 264, 184, 198, 207], &[17, 0]),
    ("cabcabca", &[17, 6, 5, 4, 6], &[17, 6, 5, 4, 6]),
    ("好好你好", &[17, 15, 10], &[17, 15, 10]),
    ("你好 你好", &[16, 16], &[16, 16]),
];

#[test]
fn sentencepiece_ids_are_those_of_sentencepiece() {
    let (bytes, unknown) = (tiny(), open_with(&tiny_model(false), &[]).unwrap());
    for (text, with_bytes, without) in PYTHON {
        assert_eq!(bytes.encode(text, SpecialTokens::Text).unwrap(), *with_bytes, "{text:?}");
        assert_eq!(unknown.encode(text, SpecialTokens::Text).unwrap(), *without, "{text:?} without byte pieces");
    }
}

/// The rule itself, slowly: of all neighbours whose text is a piece merge the pair of the highest score, leftmost first.
fn merge_by_the_rule(model: &ModelProto, text: &str) -> Vec<u32> {
    let normal = (0..).zip(&model.pieces).filter(|(_, piece)| piece.r#type() == PieceKind::Normal);
    let ids: HashMap<&str, u32> = normal.map(|(id, piece)| (piece.piece(), id)).collect();
    let find = |text: &str| ids.get(text).copied();
    let mut symbols: Vec<String> = format!("▁{text}").chars().map(|letter| letter.to_string()).collect();
    loop {
        let mut best: Option<(f32, usize)> = None;
        for at in 1..symbols.len() {
            if let Some(id) = find(&format!("{}{}", symbols[at - 1], symbols[at])) {
                let score = model.pieces[id as usize].score();
                if best.is_none_or(|(highest, _)| score > highest) {
                    best = Some((score, at));
                }
            }
        }
        let Some((_, at)) = best else { break };
        let right = symbols.remove(at);
        symbols[at - 1].push_str(&right);
    }
    symbols.iter().map(|symbol| find(symbol).expect("letters of this test are pieces")).collect()
}

#[test]
fn long_and_short_segments_merge_by_the_same_rule() {
    // Every string of up to four letters `a` and `b` is a piece, with few different scores: no place to split a text at.
    let mut model = tiny_model(true);
    let mut strings = vec![String::new()];
    for length in 1..=4 {
        let longer = strings.iter().filter(|text| text.len() + 1 == length);
        let longer: Vec<String> = longer.flat_map(|text| [format!("{text}a"), format!("{text}b")]).collect();
        strings.extend(longer);
    }
    let known: Vec<String> = model.pieces.iter().map(|piece| piece.piece().to_owned()).collect();
    let new = strings.iter().filter(|text| !text.is_empty() && !known.contains(text));
    model.pieces.extend((0u8..).zip(new).map(|(at, text)| PieceProto {
        piece: Some(text.clone()),
        score: Some(-f32::from(at * 7 % 5)),
        r#type: Some(PieceKind::Normal as i32),
    }));
    let tokenizer = open_with(&model, &[]).unwrap();

    let mut state = 7u32;
    let mut letter = |letters: &[char]| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        letters[(state >> 24) as usize % letters.len()]
    };
    for n in (1..40).chain([63, 64, 65, 66, 130, 300]) {
        for letters in [&['a', 'b'][..], &['a', 'b', 'c'], &['a', '▁'], &['a'], &['好', 'a', 'x', '\n']] {
            let text: String = (0..n).map(|_| letter(letters)).collect();
            let ids = tokenizer.encode(&text, SpecialTokens::Text).unwrap();
            assert_eq!(ids, merge_by_the_rule(&model, &text), "{text:?}");
        }
    }
}

#[test]
fn special_tokens_split_a_text_and_each_stretch_begins_anew() {
    let tokenizer = open_with(&tiny_model(true), &[("tokenizer_config.json", json!({"pad_token": "[PAD]"}))]).unwrap();
    let n_pieces = tiny_model(true).pieces.len() as u32;
    let pad = n_pieces;
    assert_eq!((tokenizer.vocab_size(), tokenizer.pad()), (pad as usize + 1, Some(pad)));
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), 2));
    let encode = |text, mode| tokenizer.encode(text, mode).unwrap();
    let stretch = |text| encode(text, SpecialTokens::Text);
    let expected = [stretch("ab "), vec![2], stretch(" ab"), vec![1, pad], stretch("a"), vec![0]].concat();
    assert_eq!(encode("ab </s> ab<s>[PAD]a<unk>", SpecialTokens::Special), expected);
    assert!(!stretch("ab</s>").contains(&2), "as text, nothing is special");
    assert!(tokenizer.has_special("a</s>") && !tokenizer.has_special("a</s >"));

    // A piece named [PAD] is special whatever its type.
    let mut model = tiny_model(true);
    model.pieces[5].piece = Some("[PAD]".into());
    let with_piece = open_with(&model, &[]).unwrap();
    assert_eq!((with_piece.pad(), with_piece.vocab_size()), (Some(5), n_pieces as usize));
    let begins = with_piece.encode("[PAD]a", SpecialTokens::Special).unwrap();
    assert_eq!(begins, [vec![5], stretch("a")].concat());

    // The template's own special tokens are special even where the sample's are text.
    let parts = [("ab</s>", true), ("a</s>", false), ("b", true)];
    let parts = parts.map(|(text, of_template)| PromptPart { text, of_template });
    let mut ids = Vec::new();
    tokenizer.encode_parts(&parts, SpecialTokens::Text, &mut ids).unwrap();
    assert_eq!(ids, [stretch("ab"), vec![2], stretch("a</s>b")].concat());
    ids.clear();
    tokenizer.encode_parts(&parts, SpecialTokens::Special, &mut ids).unwrap();
    assert_eq!(ids, [stretch("ab"), vec![2], stretch("a"), vec![2], stretch("b")].concat());

    assert_eq!(tokenizer.decode(&expected).unwrap(), "ab   ab a", "each stretch but the first keeps its prefix");
    assert_eq!(tokenizer.show(&[1, pad, 2]).unwrap(), "<s>[PAD]</s>");
    assert_eq!(tokenizer.decode(&[pad + 99]).unwrap(), "", "an id past the vocabulary has no text");
}

#[test]
fn added_tokens_of_every_file_count_in_the_vocabulary() {
    let model = tiny_model(true);
    let n = model.pieces.len() as u32;
    let config = json!({
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": true},
            n.to_string(): {"content": "<|im_start|>", "special": true, "rstrip": true},
            (n + 1).to_string(): {"content": "Bellora", "special": false},
        },
        "eos_token": {"content": "<|im_end|>"}, "bos_token": "", "pad_token": null, "add_bos_token": false,
    });
    let map =
        json!({"additional_special_tokens": ["<|x|>", "<|im_start|>", "<|x|>>"], "pad_token": {"content": "<pad>"}});
    let added = json!({"<|im_start|>": n, "<tool>": n + 4});
    let files = [("tokenizer_config.json", config), ("special_tokens_map.json", map), ("added_tokens.json", added)];
    let tokenizer = open_with(&model, &files).unwrap();
    // New names take the ids past the highest numbered one: eos, then pad, then the additional ones.
    assert_eq!(tokenizer.eos(), n + 5);
    assert_eq!(tokenizer.pad(), Some(n + 6));
    assert_eq!(tokenizer.token(n + 7).as_deref(), Some("<|x|>"));
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos()), (n as usize + 9, None));
    let ids = tokenizer.encode("<|im_start|> \na", SpecialTokens::Special).unwrap();
    assert_eq!(ids, [vec![n], tokenizer.encode("a", SpecialTokens::Text).unwrap()].concat(), "it swallows white space");
    assert!(
        tokenizer.encode("aBelloraa", SpecialTokens::Text).unwrap().contains(&(n + 1)),
        "not special: always found"
    );
    let overlapping = tokenizer.encode("<|x|>><|x|>", SpecialTokens::Special).unwrap();
    assert_eq!(overlapping, [n + 8, n + 7], "the longest first");
    assert!(!tokenizer.encode("<tool>", SpecialTokens::Text).unwrap().contains(&(n + 4)));

    let conflict = json!({"added_tokens_decoder": {"5": {"content": "<new>"}}});
    assert!(refusal(open_with(&model, &[("tokenizer_config.json", conflict)])).contains("`bc` as 5"));
    let conflict = json!({"</s>": 7});
    assert!(refusal(open_with(&model, &[("added_tokens.json", conflict)])).contains("`</s>` as 2"));
}

#[test]
fn a_bare_model_file_opens_again_the_same_from_the_files_it_gives() {
    let folder = folder(&[("any.model", &tiny_model(true).encode_to_vec()), ("tokenizer_config.json", b"{not read}")]);
    let bare = Tokenizer::open(&folder.path().join("any.model")).unwrap();
    let copy = tempfile::tempdir().unwrap();
    for file in bare.files() {
        std::fs::write(copy.path().join(&file.name), &file.bytes).unwrap();
    }
    let again = Tokenizer::open(copy.path()).unwrap();
    assert_eq!(again.fingerprint(), bare.fingerprint());
    assert_eq!((again.bos(), again.eos(), again.vocab_size()), (bare.bos(), bare.eos(), bare.vocab_size()));
    let padded = |pad| open_with(&tiny_model(true), &[("tokenizer_config.json", json!({"pad_token": pad}))]).unwrap();
    assert_ne!(padded("<a>").fingerprint(), padded("<b>").fingerprint());
}

#[test]
fn streaming_gives_whole_characters_and_the_same_text() {
    let tokenizer = tiny();
    for text in ["ab 你 é𠮷 好", "  a\n", "é", "你好 你好x", "\u{fffd}a"] {
        let ids = tokenizer.encode(text, SpecialTokens::Text).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        let mut stream = tokenizer.decode_stream();
        let pushed: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        let streamed = pushed.concat() + &stream.finish().unwrap();
        assert_eq!(streamed, text);
        assert!(text.contains('\u{fffd}') || pushed.iter().all(|part| !part.contains('\u{fffd}')), "{pushed:?}");
    }
    // A character cut off: it appears at the end, each of its bytes as one U+FFFD.
    let ids = tokenizer.encode("é", SpecialTokens::Text).unwrap();
    let mut stream = tokenizer.decode_stream();
    assert_eq!(ids[..2].iter().map(|&id| stream.push(id).unwrap()).collect::<String>(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
}

#[test]
fn models_that_would_not_come_out_exactly_are_refused_by_name() {
    let changed = |change: &dyn Fn(&mut ModelProto)| {
        let mut model = tiny_model(true);
        change(&mut model);
        refusal(open_with(&model, &[]))
    };
    let trainer = |change: &dyn Fn(&mut TrainerProto)| changed(&|model| change(model.trainer_spec.as_mut().unwrap()));
    let normalizer =
        |change: &dyn Fn(&mut NormalizerProto)| changed(&|model| change(model.normalizer_spec.as_mut().unwrap()));
    let piece = |id: usize, change: &dyn Fn(&mut PieceProto)| changed(&|model| change(&mut model.pieces[id]));
    for (message, expected) in [
        (trainer(&|spec| spec.model_type = Some(1)), "Unigram"),
        (trainer(&|spec| spec.model_type = None), "Unigram"),
        (trainer(&|spec| spec.treat_whitespace_as_suffix = Some(true)), "treat_whitespace_as_suffix"),
        (trainer(&|spec| spec.byte_fallback = Some(false)), "no byte piece"),
        (normalizer(&|spec| spec.precompiled_charsmap = Some(vec![1])), "normalises texts (`identity`)"),
        (normalizer(&|spec| spec.remove_extra_whitespaces = None), "remove_extra_whitespaces"),
        (normalizer(&|spec| spec.escape_whitespaces = Some(false)), "escape_whitespaces"),
        (piece(5, &|piece| piece.r#type = Some(PieceKind::Unused as i32)), "piece 5 `bc`"),
        (piece(5, &|piece| piece.piece = Some("ab".into())), "piece 5 `ab` stands twice"),
        (piece(5, &|piece| piece.score = Some(f32::NAN)), "piece 5 has no text or no score"),
        (piece(0, &|piece| piece.r#type = Some(PieceKind::Control as i32)), "no unknown piece"),
        (piece(2, &|piece| piece.piece = Some("</z>".into())), "no token that ends a text"),
        (changed(&|model| drop(model.pieces.pop())), "not all 256 byte pieces"),
    ] {
        assert!(message.contains(expected), "{message} (expected: {expected})");
    }
    let pointer = folder(&[("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n")]);
    assert!(refusal(Tokenizer::open(pointer.path())).contains("git-lfs"));
    let tiktoken = folder(&[("tokenizer.model", b"IQ== 0\nIg== 1\n")]);
    assert!(refusal(Tokenizer::open(tiktoken.path())).contains("not a SentencePiece model"));
    assert!(refusal(Tokenizer::open(folder(&[("vocab.json", b"{}")]).path())).contains("holds neither"));
    assert!(refusal(Tokenizer::open(Path::new("meta-llama/Llama-2-7b-hf"))).contains("does not exist"));
    let files: &[(&str, &[u8])] =
        &[("tokenizer.model", &tiny_model(true).encode_to_vec()), ("tokenizer_config.json", b"[]")];
    let error = Tokenizer::open(folder(files).path()).err().unwrap();
    assert!(error.to_string().contains("tokenizer_config.json: is not a JSON object"), "{error}");
}

/// A byte-level BPE as Llama 3 and GPT-2 have it, with settings that must not matter.
fn tiny_json(post_processor: Value) -> Value {
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "normalizer": null, "post_processor": post_processor,
        "added_tokens": [
            {"id": 16, "content": "<|begin|>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true},
            {"id": 17, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<": 4, "|": 5, "Ã": 6, "©": 7, "e": 8, "n": 9,
                            "d": 10, "o": 11, "f": 12, "t": 13, "x": 14, ">": 15}, "merges": [["a", "b"]]},
    })
}

#[test]
fn a_tokenizer_json_is_read_with_the_files_beside_it() {
    let begin = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [16], "tokens": ["<|begin|>"]}}});
    let open = |json: &Value, config: Value| {
        let (json, config) = (json.to_string().into_bytes(), config.to_string().into_bytes());
        let folder = folder(&[("tokenizer.json", &json), ("tokenizer_config.json", &config)]);
        Tokenizer::open(&folder.path().join("tokenizer.json"))
    };
    let tokenizer = open(&tiny_json(begin.clone()), json!({"pad_token": "[PAD]"})).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(16), 17, Some(18)));
    assert_eq!(tokenizer.vocab_size(), 19);
    let encode = |text, mode| tokenizer.encode(text, mode).unwrap();
    assert_eq!(encode("aab<|endoftext|> a", SpecialTokens::Special), [0, 2, 17, 3, 0]);
    let spelled = [2, 4, 5, 8, 9, 10, 11, 12, 13, 8, 14, 13, 5, 15];
    assert_eq!(encode("ab<|endoftext|>", SpecialTokens::Text), spelled);
    assert_eq!(tokenizer.decode(&[16, 0, 3, 2, 6, 7, 17]).unwrap(), "a abé");
    let mut stream = tokenizer.decode_stream();
    let streamed: Vec<String> = [0, 6, 7].iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(streamed, ["a", "", "é"]);

    let no_bos = open(&tiny_json(begin.clone()), json!({"add_bos_token": false, "eos_token": "<|begin|>"})).unwrap();
    assert_eq!((no_bos.bos(), no_bos.eos()), (None, 16));
    assert_eq!(open(&tiny_json(Value::Null), json!({})).unwrap().bos(), None);

    let mut dropout = tiny_json(Value::Null);
    dropout["model"]["dropout"] = json!(0.1);
    assert!(refusal(open(&dropout, json!({}))).contains("dropout"));
    let mut no_eos = tiny_json(Value::Null);
    no_eos["added_tokens"][1]["content"] = json!("<|stop|>");
    assert!(refusal(open(&no_eos, json!({}))).contains("no token that ends a text"));
    let mut holes = tiny_json(Value::Null);
    holes["added_tokens"][1]["id"] = json!(40);
    assert!(refusal(open(&holes, json!({}))).contains("`<|endoftext|>` as 40"));
    let conflict = json!({"added_tokens_decoder": {"8": {"content": "<|begin|>"}}});
    assert!(refusal(open(&tiny_json(Value::Null), conflict)).contains("`<|begin|>` the id 16"));
    assert!(refusal(open(&json!({}), json!({}))).contains("is not a tokenizer.json"));
}

/// Where real tokenizers and rows tokenised by the trainers themselves are; they are no part of this project.
fn reference_rows() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let folder = std::env::var_os("BELLORA_SHARED").map_or(beside, PathBuf::from);
    let found = folder.join("oracle/tokens/golden.jsonl").is_file();
    if !found {
        eprintln!("skipped: no rows of other trainers (set BELLORA_SHARED to their folder)");
    }
    found.then_some(folder)
}

fn json_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Tokenises rows and counts those that differ from `[ids, labels]`.
fn n_differing(
    rows: &Path,
    tokenizer: &Tokenizer,
    template: &Prompting,
    max_length: usize,
    wanted: &[&Value],
) -> usize {
    let spec = DataSpec {
        files: vec![rows.into()],
        max_length,
        truncation: Truncation::Cut,
        special_tokens: SpecialTokens::Special,
        answers: Answers::Last,
        max_bad_rows: 0,
    };
    let dataset = Dataset::load(&spec, tokenizer, template, TokenCache::Off).unwrap();
    let mut dump = Vec::new();
    dataset.write_dump(&mut dump).unwrap();
    let got: Vec<Value> = dump.split(|&b| b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    assert_eq!(got.len(), wanted.len());
    let differs = |(got, wanted): &(&Value, &&Value)| json!([got["input_ids"], got["labels"]]) != ***wanted;
    got.iter().zip(wanted).filter(differs).count()
}

#[test]
fn real_rows_are_tokenised_as_by_the_trainers_they_come_from() {
    let Some(shared) = reference_rows() else { return };
    let tokenizer = Tokenizer::open(&shared.join("data/tokenizers/chinese_alpaca.model")).unwrap();
    assert_eq!(tokenizer.vocab_size(), 49_954);
    let (golden, samples) = (json_lines(&shared.join("oracle/tokens/golden.jsonl")), "oracle/tokens/samples.jsonl");
    let templates = [("card", Prompting::from(Template::alpaca())), ("framework", Template::chinese_alpaca().into())];
    for (name, template) in &templates {
        let wanted: Vec<&Value> = golden.iter().map(|row| &row[*name]).collect();
        assert_eq!(n_differing(&shared.join(samples), &tokenizer, template, 512, &wanted), 0, "{name}");
    }
    for row in json_lines(&shared.join("oracle/tokens/edge.jsonl")) {
        let ids = tokenizer.encode(row["text"].as_str().unwrap(), SpecialTokens::Special).unwrap();
        assert_eq!(json!(ids), row["ids_nobos"], "{}", row["text"]);
        assert_eq!(json!([vec![1], ids].concat()), row["ids"], "{}", row["text"]);
    }
    let mut n_cases = 0;
    for case in std::fs::read_dir(shared.join("oracle/cases")).unwrap() {
        let case = case.unwrap().path();
        let read = |name| serde_json::from_slice::<Value>(&std::fs::read(case.join(name)).unwrap()).unwrap();
        let (settings, golden) = (read("case.json"), read("golden/tokenised.json"));
        let tokenizer = Tokenizer::open(&case.join("tokenizer")).unwrap();
        let max_length = settings["max_seq_length"].as_u64().unwrap() as usize;
        for (name, template) in &templates {
            let Some(wanted) = golden[*name].as_array() else {
                continue;
            };
            let wanted: Vec<&Value> = wanted.iter().collect();
            let rows = case.join("data/train.jsonl");
            assert_eq!(n_differing(&rows, &tokenizer, template, max_length, &wanted), 0, "{case:?} {name}");
            n_cases += 1;
        }
    }
    eprintln!("{} real rows, 34 edge strings and {n_cases} cases agree", 2 * golden.len());
}
