//! Floating-point operations of a training step, counted as the engine computes them: a product of `[N, I]` by `[I, O]`
//! is `2 N I O`. Norms, rotations and other work that reads memory rather than multiplies is not counted.

use serde::Serialize;

use crate::model::lora::LoraSpec;
use crate::model::shape::{ModelShape, Projection, Table};

/// What the tokens of a data set are like, on average.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TokenMix {
    /// The share of tokens that are learned: only the rows before them reach the head.
    pub learned_share: f64,
    /// How many positions a token attends to, itself included: in a document of `T` tokens `(T + 1) / 2`.
    pub attended: f64,
}

impl TokenMix {
    /// The mix of documents, each given by its tokens and how many of them are learned.
    ///
    /// Long documents hold more of the tokens, so that `attended` is more than it would be at the mean length.
    pub fn of(documents: impl Iterator<Item = (usize, usize)>) -> Self {
        let (mut tokens, mut learned, mut attended) = (0.0, 0.0, 0.0);
        for (length, n_learned) in documents {
            let length = length as f64;
            tokens += length;
            learned += n_learned as f64;
            attended += length * (length + 1.0) / 2.0;
        }
        Self { learned_share: learned / tokens.max(1.0), attended: attended / tokens.max(1.0) }
    }
}

/// Operations a token, by part.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Flops {
    /// Forward through the frozen projections.
    pub base_forward: f64,
    /// The gradient of their inputs.
    pub base_backward: f64,
    /// The adapters, both ways.
    pub lora: f64,
    /// The head, both ways, over the learned tokens alone.
    pub head: f64,
    /// Scores and sums of values, both ways, causal.
    pub attention: f64,
    /// What recompute does again. It is work, but no progress: not in [`Flops::total`].
    pub recompute: f64,
}

impl Flops {
    /// Counts a step's operations a token. With `recompute` every block's forward runs twice.
    pub fn a_token(config: &ModelShape, lora: &LoraSpec, mix: TokenMix, recompute: bool) -> Self {
        let layers = config.num_hidden_layers as f64;
        let elements = |p: Projection| p.shape(config).iter().product::<i64>() as f64;
        let weights: f64 = Projection::ALL.into_iter().map(elements).sum();
        let rank_elements = |p: &Projection| (lora.r * p.shape(config).iter().sum::<i64>()) as f64;
        let adapters: f64 = lora.target_modules.iter().map(rank_elements).sum();

        // Beneath the lowest block nothing needs a gradient unless the embedding is trained.
        let lowest = [Projection::Q, Projection::K, Projection::V];
        let stops_early = !lora.trains(Table::Embed);
        let skipped_weights: f64 = if stops_early { lowest.into_iter().map(elements).sum() } else { 0.0 };
        let skipped_a: f64 = match stops_early {
            true => lowest.iter().filter(|p| lora.adapts(**p)).map(|p| (lora.r * p.shape(config)[1]) as f64).sum(),
            false => 0.0,
        };

        let head = (config.vocab_size * config.hidden_size) as f64 * mix.learned_share;
        // Two products forward (scores, values), four backward; the scores that a kernel makes again are not counted.
        let attention = 2.0 * config.heads().q_width() as f64 * mix.attended;
        let base_forward = 2.0 * layers * weights;
        Self {
            base_forward,
            base_backward: base_forward - 2.0 * skipped_weights,
            // Forward, the gradient of the input and that of the weight: three products for A as for B.
            lora: 6.0 * layers * adapters - 2.0 * skipped_a,
            head: if lora.trains(Table::Head) { 6.0 * head } else { 4.0 * head },
            attention: 6.0 * layers * attention,
            recompute: match recompute {
                true => layers * 2.0 * (weights + adapters + attention),
                false => 0.0,
            },
        }
    }

    /// What training takes, however it is carried out.
    pub fn total(&self) -> f64 {
        self.base_forward + self.base_backward + self.lora + self.head + self.attention
    }
}
