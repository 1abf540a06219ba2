//! What a row or a turn says about what is to be learned, and what it holds that would have to be learned or seen.
//!
//! Bellora learns the last answer of a row, as text. A key that asks for something else makes the row bad; it is never
//! passed over. The keys are those of OpenAI's and Mistral's fine-tuning (`weight`, `tool_calls`, `function_call`), axolotl
//! (`train`, `train_detail`), ms-swift (`loss`, `loss_scale`), NeMo (`mask`), LLaMA-Factory (`chosen`, `kto_tag`, `images`,
//! `tools`), TRL (`completion_mask`) and of servers (`reasoning_content`, `refusal`).

use serde_json::Value;

use super::json::{kind, shortened};
use super::reason::Reason;

/// What a key is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum About {
    /// Whether something is learned: 1 or true, 0 or false.
    Switch,
    /// Whether something is left out: 1 or true, 0 or false.
    Skip,
    /// A system prompt under another name than `system`.
    System,
    /// Whether an answer is a good one: true or false; other values are labels of another kind.
    Verdict,
    /// Which parts are learned, token by token or turn by turn.
    Mask,
    /// A call of a tool, or the tools that may be called.
    Tools,
    /// What is thought before the answer.
    Reasoning,
    /// A refusal beside the answer.
    Refusal,
    /// Pictures, sound, film.
    Media,
    /// A better and a worse answer.
    Preference,
}

/// A key that says something, and its value.
pub(super) type Said = (&'static str, About, Value);

/// The key of that name, if it says something about what is learned.
pub(super) fn key(name: &str) -> Option<(&'static str, About)> {
    const KEYS: [(About, &[&str]); 10] = [
        (
            About::Switch,
            &[
                "weight",
                "weights",
                "loss_weight",
                "sample_weight",
                "loss",
                "loss_scale",
                "train",
                "training",
                "trainable",
                "is_train",
                "is_trainable",
                "do_train",
                "train_on_turn",
                "include_in_loss",
                "kto_tag",
            ],
        ),
        (About::Skip, &["skip", "ignore", "ignored", "exclude", "excluded", "deleted"]),
        (About::Verdict, &["label"]),
        (
            About::Mask,
            &[
                "mask",
                "masked",
                "masks",
                "loss_mask",
                "loss_masks",
                "label_mask",
                "train_mask",
                "train_detail",
                "training_detail",
                "completion_mask",
                "assistant_mask",
                "assistant_masks",
            ],
        ),
        (
            About::Tools,
            &["tools", "functions", "tool_calls", "tool_call", "function_call", "function_calls", "tool_responses"],
        ),
        (
            About::Reasoning,
            &[
                "reasoning_content",
                "reasoning",
                "reasoning_details",
                "thinking",
                "thinking_blocks",
                "thought",
                "thoughts",
                "cot",
            ],
        ),
        (About::Refusal, &["refusal"]),
        (
            About::Media,
            &["image", "images", "image_path", "video", "videos", "video_path", "audio", "audios", "audio_path"],
        ),
        (About::Preference, &["chosen", "rejected", "chosen_response", "rejected_response"]),
        (About::System, &["system_prompt", "system_message"]),
    ];
    let is = |known: &str| letters(known).eq(letters(name));
    KEYS.iter().find_map(|(about, names)| names.iter().find(|known| is(known)).map(|known| (*known, *about)))
}

/// The letters of a key: `Loss-Weight` is `loss_weight`.
fn letters(name: &str) -> impl Iterator<Item = u8> {
    name.bytes().filter(|byte| !matches!(byte, b'_' | b'-' | b' ')).map(|byte| byte.to_ascii_lowercase())
}

/// Whose words a turn of a dialogue holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    System,
    User,
    Assistant,
}

/// What the switches of a row or a turn say together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wish {
    /// Nothing.
    None,
    /// To learn it.
    Learn,
    /// Not to learn it: the key and its value.
    Leave(String),
}

/// Reads what the keys of a row or a turn say.
///
/// # Errors
/// Where they ask for what is not done.
pub(super) fn wish(said: &[Said]) -> Result<Wish, Reason> {
    let mut wish = Wish::None;
    for (name, about, value) in said.iter().filter(|(_, about, value)| !is_nothing(*about, value)) {
        let holds = |what: &str, hint: &str| Err(Reason::new(format!("holds `{name}`: {what}")).hint(hint));
        match about {
            About::Verdict if !value.is_boolean() => {}
            About::Switch | About::Verdict => match switch(value) {
                Some(true) if wish == Wish::None => wish = Wish::Learn,
                Some(true) => {}
                Some(false) => wish = Wish::Leave(format!("`{name}` is {value}")),
                None => {
                    let found = if value.is_number() { value.to_string() } else { kind(value).to_owned() };
                    return Err(Reason::new(format!("has {found} as `{name}`: known are 0 and 1, true and false"))
                        .hint("answers are learned or not, with equal weight; remove the key, or the row"));
                }
            },
            About::Skip => match switch(value) {
                Some(false) => {}
                _ => wish = Wish::Leave(format!("`{name}` is {value}")),
            },
            About::System => {
                return holds("the key of a system prompt is `system`", "rename it, or remove it");
            }
            // NeMo names the side whose turns are not learned.
            About::Mask if value.as_str().is_some_and(|side| ["user", "human"].contains(&&*side.to_lowercase())) => {}
            About::Mask => {
                return holds(
                    "which parts are learned is not read from rows; the last answer is learned, whole",
                    "remove the key if that is meant, else the row",
                );
            }
            About::Tools => {
                return holds(
                    "calls of tools are not learned, and tools not shown to the model",
                    "write calls and tools into the texts of the turns, as the model is to see them, or remove the row",
                );
            }
            About::Reasoning => {
                return holds(
                    "reasoning beside the answer is not learned",
                    "write it into the answer's text, as the model is to write it, or remove the key",
                );
            }
            About::Refusal => return holds("a refusal beside the answer is not learned", "write it as the answer"),
            About::Media => {
                return holds(
                    "the models trained here see text alone",
                    "remove the row, or the key if the text is enough",
                );
            }
            About::Preference => {
                return holds(
                    "preference pairs (DPO, ORPO, reward models) are not trained on",
                    "to learn the chosen answer alone, write it as `output`, and leave `chosen` and `rejected` out",
                );
            }
        }
    }
    Ok(wish)
}

/// Whether a value says nothing. LLaMA-Factory writes lists of tools as text.
fn is_nothing(about: About, value: &Value) -> bool {
    match value {
        Value::Null => true,
        // A mark of the row, and not what would have to be learned or seen.
        Value::Bool(_) if matches!(about, About::Reasoning | About::Refusal) => true,
        Value::Bool(truth) => !truth && matches!(about, About::Tools | About::Media | About::Preference),
        Value::String(text) => matches!(text.trim(), "" | "[]" | "{}" | "null"),
        Value::Array(items) => items.iter().all(|item| is_nothing(about, item)),
        Value::Object(entries) => entries.values().all(|entry| is_nothing(about, entry)),
        Value::Number(_) => false,
    }
}

fn switch(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(truth) => Some(*truth),
        Value::Number(number) if number.as_f64() == Some(1.0) => Some(true),
        Value::Number(number) if number.as_f64() == Some(0.0) => Some(false),
        _ => None,
    }
}

/// Why a turn by somebody else than the known three cannot be used.
pub(super) fn unknown_role(role: &str) -> Reason {
    let reason = Reason::new(format!("is by `{}`", shortened(role)));
    match role {
        "tool" | "function" | "observation" | "ipython" | "environment" | "tool_response" | "function_response"
        | "function_call" | "tool_call" => reason.hint(
            "known are human or user, assistant or gpt, and system; calls of tools and what they answer are not learned: \
             write them into the texts of those turns, or remove the row",
        ),
        "developer" => reason.hint(
            "known are human or user, assistant or gpt, and system; if this is the system prompt, write `system`",
        ),
        _ => reason.hint("known are human or user, assistant or gpt, and system"),
    }
}
