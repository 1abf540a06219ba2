//! What is known of an update once it is done.

use serde::Serialize;

/// What an update did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepMetrics {
    /// The update, counted from 1.
    pub step: u64,
    /// The mean loss over the global batch; `None` when nothing was to be learned.
    pub loss: Option<f64>,
    /// The gradient's L2 norm before clipping; `None` when there was none.
    pub grad_norm: Option<f64>,
    /// The learning rate used.
    pub lr: f64,
    /// Samples of the global batch.
    pub samples: u64,
    /// Tokens of the global batch.
    pub tokens: u64,
    /// Tokens that were learned.
    pub label_tokens: u64,
    /// Wall-clock seconds.
    pub step_secs: f64,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// The loss scale used; 1 where there is none.
    pub loss_scale: f64,
    /// Whether the parameters were left as they are.
    pub skipped: bool,
}
