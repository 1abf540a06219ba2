#!/usr/bin/env python3
"""Writes tests/tokenizers/folders.json: small tokenizer folders, and the ids that Transformers gives for texts.

    PYTHON scripts/make_tokenizer_golden.py

Run it once with Transformers 5 and once with Transformers 4 (and sentencepiece, protobuf): each version answers the
cases that name it in `by` and leaves the others as they are. "4" is `LlamaTokenizer` of Transformers 4, "4 fast" its
`AutoTokenizer`, "5" the `AutoTokenizer` of Transformers 5. No network and no torch is needed.
"""
import copy, json, os, sys, tempfile, warnings

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")
import transformers
from sentencepiece import sentencepiece_model_pb2 as pb
from transformers import AutoTokenizer

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "tokenizers", "folders.json")
MERGED = ["▁t", "▁a", "he", "us", "er", "▁u", "▁the", "user", "ll", "▁us", "▁user", "hell", "▁h", "ello", "hello", "▁he",
          "▁hello", "to", "ol", "tool", "▁to", "▁tool", "▁▁", "你好", "▁你好", "▁b", "ab", "<|", "|>"]
LETTERS = ["▁"] + list("abehlorstux<|/>_1你好，.")
PIECES = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + MERGED + LETTERS
N = len(PIECES)
TEXTS = ["", "a", " a", "  a", "the user", "hello", "\nhello", "a <x> b", "a<x>b", "<x> a", " <x>", "<x><y> <x>", "ab <x>  <y>b ",
         "a </s> b", "</s>a", "a</s>", "<s>user\nhello</s>\n<s>", "tool", " tool", "a tool b", "tools", "a_tool", "tool tool",
         "你好<x>你好", "▁a", "▁<x>▁", "hello <unk> hello", "<x>\n\n<y>\nuser", "  <y>  ", "<0x41>é<x>é", "<x", "a\u3000<x>\u3000b", "zap", "zaps", "a zap_b", "zap zap", "你zap 你", "zap<x>zap"]


def model():
    proto = pb.ModelProto()
    for id, text in enumerate(PIECES):
        kind = 2 if id == 0 else 3 if id < 3 else 6 if id < 259 else 1
        proto.pieces.add(piece=text, score=-float(id - 258) if id >= 259 else 0.0, type=kind)
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def merges():
    ids = {text: id for id, text in enumerate(PIECES)}
    return [[text[:at], text[at:]] for text in MERGED for at in range(1, len(text)) if text[:at] in ids and text[at:] in ids]


def token(text, special=True, **flags):
    off = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": text, **off, "special": special, **flags}


def flagged(text, **flags):
    return {key: value for key, value in token(text, **flags).items() if key != "special"}


OWN = {str(id): token(PIECES[id]) for id in range(3)}


def config(*added, **more):
    both = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    decoder = {"added_tokens_decoder": {**OWN, **{str(N + at): t for at, t in enumerate(added)}}} if added else {}
    return {**both, **decoder, **more}


def tokenizer_json(*added, kind="prepend"):
    """Without vocabulary and merges, which are every file's."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": kind, "split": False}
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": at, **t} for at, t in zip([0, 1, 2, *range(N, N + 99)], [*OWN.values(), *added])],
            "normalizer": prepend if kind == "prepend" else None, "pre_tokenizer": None if kind == "prepend" else metaspace,
            "post_processor": template, "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}}


CONFIG, MAP, ADDED, JSON = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"
X, Y = token("<x>"), token("<y>")
IN_VOCAB = {"eos_token": "tool", "legacy": False}
# name, who answers, files, whether a tokenizer.model is there, what a warning says (none where it is empty)
CASES = [
    ("legacy", "4", {CONFIG: config(X, Y, legacy=True)}, True, ""),
    ("legacy is false", "5", {CONFIG: config(X, Y, legacy=False)}, True, ""),
    ("legacy is false, no bos", "5", {CONFIG: config(X, Y, legacy=False, add_bos_token=False)}, True, ""),
    ("no prefix space", "5", {CONFIG: config(X, Y, legacy=False, add_prefix_space=False)}, True, ""),
    ("no prefix space, legacy", "5", {CONFIG: config(X, Y, legacy=True, add_prefix_space=False)}, True, ""),
    ("flags in the decoder", "5", {CONFIG: config(token("<x>", lstrip=True, rstrip=True), token("zap", False, single_word=True),
                                                  token("<y>", False, normalized=True, rstrip=True), legacy=False)}, True, ""),
    ("flags in the decoder, legacy", "4", {CONFIG: config(token("<x>", lstrip=True), token("<y>", False, rstrip=True), legacy=True)}, True, ""),
    ("flags in the map", "4", {CONFIG: config(legacy=True), MAP: {
        "eos_token": flagged("</s>", lstrip=True, rstrip=True), "additional_special_tokens": [flagged("<x>", lstrip=True, rstrip=True)]}}, True, ""),
    ("flags in the map, ids beside", "4", {CONFIG: config(legacy=True), ADDED: {"<x>": N, "<y>": N + 1}, MAP: {
        "pad_token": flagged("<x>", lstrip=True, rstrip=True), "additional_special_tokens": [flagged("<y>", lstrip=True)]}}, True, ""),
    ("flags in the config", "4 fast", {CONFIG: config(legacy=False, eos_token={"__type": "AddedToken", **flagged("</s>", rstrip=True)},
                                                 pad_token={"__type": "AddedToken", **flagged("<x>", lstrip=True)})}, True, ""),
    ("extra tokens by name", "5", {CONFIG: config(legacy=False, extra_special_tokens={"image_token": "<x>", "other": "<y>"})}, True, ""),
    ("extra tokens in a list", "5", {CONFIG: config(legacy=False, extra_special_tokens=["<x>", "<y>"])}, True, ""),
    ("a piece is named", "5", {CONFIG: config(legacy=False, additional_special_tokens=["he", "tool"])}, True, ""),
    ("a tokenizer.json, special in the vocabulary", "5", {CONFIG: config(**IN_VOCAB), JSON: tokenizer_json(kind="first")}, False, ""),
    ("a tokenizer.json, special by the map", "5", {CONFIG: config(legacy=False), MAP: {"additional_special_tokens": ["tool", "user"]},
                                                    JSON: tokenizer_json(kind="first")}, False, ""),
    ("a tokenizer.json and flags in the decoder", "5", {
        CONFIG: config(token("<x>", lstrip=True, rstrip=True), token("<y>", False, single_word=True), legacy=False),
        JSON: tokenizer_json(X, Y, kind="first")}, False, ""),
    ("a tokenizer.json and tokens that it lacks", "5", {CONFIG: config(legacy=False, extra_special_tokens=["<x>"], pad_token="<y>"),
                                                         JSON: tokenizer_json(kind="first")}, False, ""),
    ("a tokenizer.json whose spaces are not those of legacy", "5", {CONFIG: config(legacy=False), JSON: tokenizer_json(X, Y)}, False,
     "legacy: is false"),
    ("a tokenizer.json whose spaces are not wanted", "5", {CONFIG: config(add_prefix_space=False), JSON: tokenizer_json(X)}, False,
     "add_prefix_space: is false"),
    ("a tokenizer.json as it is", "4 fast", {CONFIG: config(legacy=True), JSON: tokenizer_json(X, Y)}, False, ""),
    ("both, the same", "4 fast", {CONFIG: config(X, Y, legacy=True), JSON: tokenizer_json(X, Y)}, True, ""),
    ("both, the same, legacy is false", "5", {CONFIG: config(X, Y, legacy=False), JSON: tokenizer_json(X, Y)}, True, ""),
    ("both, other tokens", "5", {CONFIG: config(legacy=False), JSON: tokenizer_json(X, Y, kind="first")}, True, "the latter is taken"),
    ("both, tokens in another order", "5", {CONFIG: config(legacy=False, extra_special_tokens=["<y>", "<x>"]),
                                            JSON: tokenizer_json(X, Y, kind="first")}, True, "the latter is taken"),
    ("both, other spaces", "5", {CONFIG: config(X, Y), JSON: tokenizer_json(X, Y, kind="first")}, True, "the latter is taken"),
]


def answer(by, files, has_model):
    with tempfile.TemporaryDirectory() as folder:
        for name, value in copy.deepcopy(files).items():
            if name == JSON:
                value["model"].update(vocab={text: id for id, text in enumerate(PIECES)}, merges=merges())
            with open(os.path.join(folder, name), "w") as file:
                json.dump(value, file)
        if has_model:
            with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
                file.write(model())
        options = {"use_fast": by == "4 fast"} if by.startswith("4") else {}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        return [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]


def main():
    known = json.load(open(OUT))["cases"] if os.path.exists(OUT) else []
    known = {case["name"]: case for case in known}
    cases = []
    for name, by, files, has_model, warning in CASES:
        case = {"name": name, "by": by, "files": files, "model": has_model, "warning": warning}
        if by.startswith(transformers.__version__[0]):
            case["version"], case["ids"] = transformers.__version__, answer(by, files, has_model)
        elif name in known:
            case["version"], case["ids"] = known[name]["version"], known[name]["ids"]
        cases.append(case)
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    head = {"pieces": PIECES, "merges": merges(), "texts": TEXTS}
    with open(OUT, "w") as out:
        out.write(json.dumps(head, ensure_ascii=False, separators=(",", ":"))[:-1] + ',\n"cases":[\n' + lines + "\n]}\n")
    print(f"{sum('ids' in case for case in cases)} of {len(cases)} cases are answered", file=sys.stderr)


if __name__ == "__main__":
    main()
