//! A step whose loss or gradient is not finite, told sample by sample, so that the one that did it shows.

use std::fmt::Write as _;

use serde::{Serialize, Serializer};

use crate::error::Error;

/// Samples that a message names at most.
const N_NAMED: usize = 3;

/// A sample of an update with its own loss.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SampleLoss {
    /// The step, counted from 1.
    pub step: u64,
    /// Where the sample stands: `file:line`.
    pub place: String,
    /// Its place within the update, from 0.
    pub slot: usize,
    /// Its tokens.
    pub tokens: usize,
    /// Those of them that are learned.
    pub label_tokens: usize,
    /// The mean over them; `None` where there is none, or where it could not be computed.
    #[serde(serialize_with = "number_or_word")]
    pub loss: Option<f64>,
}

/// A step that was not applied because its loss or its gradient is not finite and no loss scale could mend that.
#[derive(Debug, Clone, PartialEq)]
pub struct NonFinite {
    /// The step, counted from 1.
    pub step: u64,
    /// Its mean loss.
    pub loss: f64,
    /// Its gradient's L2 norm.
    pub grad_norm: f64,
    /// Its loss scale.
    pub loss_scale: f64,
    /// Whether it has one because it computes in fp16.
    pub is_fp16: bool,
    /// Which such step of the run it is, from 1.
    pub nth: u64,
    /// How many of them the run passes over; 0 when the first one ends it.
    pub allowed: u64,
    /// Steps that had been begun before the losses below were computed, and may have changed the parameters: none on a
    /// CPU; on a GPU one, whose outcomes come late.
    pub steps_since: u64,
    /// The samples, in the update's order.
    pub samples: Vec<SampleLoss>,
}

impl NonFinite {
    /// Whether the run ends here.
    pub fn ends_the_run(&self) -> bool {
        self.nth > self.allowed
    }

    /// One JSON object a line: first the step, then each of its samples in the update's order. Numbers that are not finite
    /// are the words `"NaN"`, `"inf"` and `"-inf"`, for JSON has no others; `null` is a loss that does not exist.
    pub fn to_json_lines(&self) -> String {
        #[derive(Serialize)]
        struct Head {
            step: u64,
            #[serde(serialize_with = "number_or_word")]
            loss: Option<f64>,
            #[serde(serialize_with = "number_or_word")]
            grad_norm: Option<f64>,
            loss_scale: f64,
            nth: u64,
            allowed: u64,
            steps_since: u64,
            samples: usize,
        }
        let &Self { step, loss, grad_norm, loss_scale, nth, allowed, steps_since, .. } = self;
        let (loss, grad_norm, samples) = (Some(loss), Some(grad_norm), self.samples.len());
        let head = Head { step, loss, grad_norm, loss_scale, nth, allowed, steps_since, samples };
        let mut text = json_line(&head);
        text.extend(self.samples.iter().map(json_line));
        text
    }

    /// What is told of a step that is passed over.
    pub fn warning(&self) -> String {
        let Self { step, nth, allowed, .. } = self;
        format!("step {step} was passed over, {nth} of at most {allowed}: {}", self.what())
    }

    /// What ends the run; `advice` is what may mend it.
    pub(super) fn error(&self, advice: &str) -> Error {
        let beyond = match self.allowed {
            0 => String::new(),
            allowed => format!("; it is one more than train.max_non_finite = {allowed} lets pass"),
        };
        let skip = if self.allowed == 0 { "; train.non_finite = \"skip\" passes over such steps" } else { "" };
        let first: Vec<&str> = self.samples.iter().take(N_NAMED).map(|sample| &*sample.place).collect();
        Error::failed(format!("step {}", self.step), format!("{}; the step was not applied{beyond}", self.what())).hint(
            format!(
                "{advice}{skip}; the step's samples begin with {}; the newest checkpoint is from before this step",
                first.join(", ")
            ),
        )
    }

    /// The numbers, and the samples that are so by themselves.
    fn what(&self) -> String {
        let scale = if self.is_fp16 { " at loss scale 1, the least there is" } else { "" };
        let mut what = format!("loss {}, gradient norm {}{scale}: not finite", self.loss, self.grad_norm);
        let is_bad = |sample: &&SampleLoss| sample.loss.is_some_and(|loss| !loss.is_finite());
        let bad: Vec<&str> = self.samples.iter().filter(is_bad).map(|sample| &*sample.place).collect();
        // Writing to a text cannot fail.
        let _ = match (bad.as_slice(), bad.len().saturating_sub(N_NAMED)) {
            ([], _) if self.samples.iter().all(|sample| sample.loss.is_none()) => {
                write!(what, "; the losses of its samples could not be computed singly")
            }
            ([], _) => write!(what, ", though each sample's loss is, taken singly"),
            (named, 0) => write!(what, "; so is by itself the loss of {}", named.join(", ")),
            (named, more) => {
                write!(what, "; so is by itself the loss of {} and {more} more", named[..N_NAMED].join(", "))
            }
        };
        what
    }
}

/// A value as one line of JSON.
pub fn json_line(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("numbers and strings make JSON") + "\n"
}

/// Writes a number that is not finite as a word.
fn number_or_word<S: Serializer>(number: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match number {
        Some(number) if !number.is_finite() => serializer.collect_str(number),
        number => number.serialize(serializer),
    }
}
