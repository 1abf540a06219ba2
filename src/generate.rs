//! Text generation: greedy or sampled, one token at a time over a key-value cache.

use tch::{Kind, Tensor};

use crate::data::Tokenizer;
use crate::error::Result;
use crate::model::decoder::Decoder;
use crate::torch::number::WithNumber;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Keeps the likeliest tokens up to this share of probability; 1 keeps all.
    pub top_p: f64,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Seed of the draws.
    pub seed: u64,
}

/// Generates at most `max_new_tokens` tokens after a prompt and passes each piece of whole characters to `emit`.
///
/// Ends before a stop id, or after a stop string, which are not emitted. The prompt has at least one token.
pub fn generate(
    model: &Decoder,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    stop_ids: &[u32],
    stop_strings: &[String],
    max_new_tokens: usize,
    sampling: Sampling,
    mut emit: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    tch::manual_seed(sampling.seed as i64);
    let mut cache = model.new_cache((prompt.len() + max_new_tokens) as i64)?;
    let mut stream = tokenizer.decode_stream();
    let mut held = Held::new(stop_strings);
    let mut next: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
    for _ in 0..max_new_tokens {
        let logits = model.decode(&next, &mut cache)?;
        let id = choose(&logits, sampling)?;
        if stop_ids.contains(&(id as u32)) {
            break;
        }
        if held.push(&stream.push(id as u32)?, &mut emit)? {
            return Ok(());
        }
        next = vec![id];
    }
    if held.push(&stream.finish()?, &mut emit)? {
        return Ok(());
    }
    held.finish(&mut emit)
}

/// Text held back while it could still be the beginning of a stop string.
struct Held<'a> {
    stops: &'a [String],
    text: String,
}

impl<'a> Held<'a> {
    fn new(stops: &'a [String]) -> Self {
        Self { stops, text: String::new() }
    }

    /// Takes more text; true when a stop string was met.
    fn push(&mut self, text: &str, emit: &mut impl FnMut(&str) -> Result<()>) -> Result<bool> {
        self.text.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.text.find(s.as_str())).min() {
            emit(&self.text[..at])?;
            return Ok(true);
        }
        let is_start_of_stop = |tail: &str| self.stops.iter().any(|s| s.starts_with(tail));
        let keep_from = self.text.char_indices().map(|(i, _)| i).find(|&i| is_start_of_stop(&self.text[i..]));
        let rest = self.text.split_off(keep_from.unwrap_or(self.text.len()));
        emit(&std::mem::replace(&mut self.text, rest))?;
        Ok(false)
    }

    fn finish(self, emit: &mut impl FnMut(&str) -> Result<()>) -> Result<()> {
        emit(&self.text)
    }
}

/// Chooses the next token from logits `[V]`.
fn choose(logits: &Tensor, sampling: Sampling) -> Result<i64> {
    if sampling.temperature == 0.0 {
        return Ok(logits.f_argmax(None, false)?.f_int64_value(&[])?);
    }
    // From the largest downwards, so that no temperature is too low to divide by.
    let logits = logits.f_to_kind(Kind::Double)?;
    let logits = logits.f_sub(&logits.f_max()?)?.f_over(sampling.temperature)?;
    let (sorted, ids) = logits.f_sort(-1, true)?;
    let mut p = sorted.f_softmax(-1, Kind::Double)?;
    let n = p.size()[0];
    if sampling.top_k > 0 && (sampling.top_k as i64) < n {
        let k = sampling.top_k as i64;
        let _ = p.f_narrow(0, k, n - k)?.f_zero_()?;
        p = p.f_div(&p.f_sum(Kind::Double)?)?;
    }
    if sampling.top_p < 1.0 {
        // A token stays when the tokens before it do not yet make up the share; the likeliest always does.
        let before = p.f_cumsum(-1, Kind::Double)?.f_sub(&p)?;
        p.f_fill_where_(&before.f_is_from(sampling.top_p)?, 0.0)?;
    }
    let at = p.f_multinomial(1, false)?;
    Ok(ids.f_index_select(0, &at)?.f_int64_value(&[0])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn emitted(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut out = String::new();
        let mut emit = |s: &str| {
            out.push_str(s);
            Ok(())
        };
        let mut held = Held::new(&stops);
        let stopped = pieces.iter().any(|p| held.push(p, &mut emit).expect("emit never fails"));
        if !stopped {
            held.finish(&mut emit).expect("emit never fails");
        }
        (out, stopped)
    }

    #[test]
    fn a_stop_string_is_found_across_pieces_and_not_emitted() {
        assert_eq!(emitted(&["<end>"], &["你好<", "en", "d>后面"]), ("你好".into(), true));
        assert_eq!(emitted(&["<end>"], &["a<e", "x<"]), ("a<ex<".into(), false));
        assert_eq!(emitted(&[], &["一", "二"]), ("一二".into(), false));
    }

    #[test]
    fn sampling_keeps_to_top_k_and_top_p() {
        let logits = Tensor::from_slice(&[0.0f32, 3.0, 2.0, 1.0]);
        let draws = |sampling: Sampling| -> Vec<i64> {
            tch::manual_seed(1);
            (0..200).map(|_| choose(&logits, sampling).expect("valid logits")).collect()
        };
        let all = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: 0 };
        assert!(draws(Sampling { temperature: 0.0, ..all }).iter().all(|&i| i == 1));
        let two = draws(Sampling { top_k: 2, ..all });
        assert!(two.iter().all(|i| [1, 2].contains(i)) && two.contains(&2));
        // Probabilities 0.64, 0.24, 0.09, 0.03: 0.7 needs the first two.
        let seven = draws(Sampling { top_p: 0.7, ..all });
        assert!(seven.iter().all(|i| [1, 2].contains(i)) && seven.contains(&2));
        assert!(draws(all).contains(&3));
    }
}
