//! Where the files of a job say different things, or ask for what is not computed.

use std::collections::BTreeSet;
use std::path::Path;

use crate::config::{Auto, Config};
use crate::data::{Answers, Prompting, SpecialTokens, Tokenizer};
use crate::error::Fault;
use crate::formats::model_keys::CONFIG;
use crate::model::shape::ModelShape;

/// Refuses a base whose attention weights would be dropped at random in training: that is not computed.
pub(super) fn attention_dropout(base: &ModelShape, dir: &Path) -> Option<Fault> {
    let place = format!("{}: attention_dropout", dir.join(CONFIG.file).display());
    let what = format!("is {}, and dropout of attention weights is not supported", base.attention_dropout);
    let hint =
        "set model.allow_config_keys = [\"attention_dropout\"] to train without it: the base itself stays the same";
    (base.attention_dropout > 0.0).then(|| Fault::new(place, what).hint(hint))
}

/// Refuses special tokens as plain text where the text of a row and that of the template are encoded as one.
pub(super) fn special_tokens_as_text(config: &Config, template: &Prompting) -> Option<Fault> {
    let is_whole = matches!(template, Prompting::Chat(_)) || config.data.learn == Auto::Is(Answers::All);
    let is_asked = config.data.special_tokens == SpecialTokens::Text;
    let what = "is \"text\", and with a chat template or data.learn = \"all\" special tokens in a text are special";
    let fault = Fault::new("data.special_tokens", what).hint("leave it out, or take such rows out of the data");
    (is_whole && is_asked).then_some(fault)
}

/// Where the base and the tokenizer name other tokens as the ends of a text.
pub(super) fn other_ends(dir: &Path, base: &ModelShape, tokenizer: &Tokenizer) -> Vec<Fault> {
    let shown =
        |id: u32| format!("{id} ({})", tokenizer.token(id).map_or("no token of it".to_owned(), |t| format!("`{t}`")));
    let place = |key: &str| format!("{}: {key}", dir.join(CONFIG.file).display());
    let mut warnings = Vec::new();
    let ends = &base.eos_token_ids;
    if !ends.is_empty() && !ends.contains(&tokenizer.eos()) {
        let distinct: BTreeSet<u32> = ends.iter().copied().collect();
        let theirs: Vec<String> = distinct.into_iter().map(shown).collect();
        let what = format!(
            "ends a text with token {}, and {} ends one with {}",
            theirs.join(", "),
            tokenizer.place(),
            shown(tokenizer.eos())
        );
        warnings.push(Fault::new(place("eos_token_id"), what).hint(
            "answers are trained to end in the tokenizer's token; generate stops there, and so does a merged model",
        ));
    }
    if let (Some(theirs), Some(ours)) = (base.bos_token_id, tokenizer.bos())
        && theirs != ours
    {
        let what = format!(
            "begins a text with token {}, and {} begins one with {}",
            shown(theirs),
            tokenizer.place(),
            shown(ours)
        );
        warnings.push(Fault::new(place("bos_token_id"), what).hint("the tokenizer's token goes before each prompt"));
    }
    warnings
}
