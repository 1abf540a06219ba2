//! What bytes are for, and the passes of a micro-batch that need them.

use serde::Serialize;

use crate::engine::probe::Expected;

/// What bytes are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryPart {
    /// Frozen weights in the compute dtype.
    FrozenWeights,
    /// The trained parameters in fp32.
    Masters,
    /// Their gradients in fp32.
    Gradients,
    /// AdamW's two moments in fp32.
    Moments,
    /// The half-precision copy of the trained parameters that products read.
    ComputeCopy,
    /// What the blocks keep of a micro-batch for backward.
    KeptActivations,
    /// The head: learned rows, one chunk of logits with its gradient, the gradient of the rows.
    Head,
    /// Masked inputs of the adapters.
    Dropout,
    /// Everything else that comes and goes within a pass.
    Temporaries,
    /// Ids, positions, targets, weights, rotations.
    Batch,
    /// Workspaces of the device's libraries; on a CPU also their code and what they remember.
    Workspaces,
}

impl MemoryPart {
    /// All of them, the lasting ones first.
    pub const ALL: [Self; 11] = [
        Self::FrozenWeights,
        Self::Masters,
        Self::Gradients,
        Self::Moments,
        Self::ComputeCopy,
        Self::Workspaces,
        Self::Batch,
        Self::KeptActivations,
        Self::Head,
        Self::Dropout,
        Self::Temporaries,
    ];

    /// The part as tables name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::FrozenWeights => "frozen weights",
            Self::Masters => "master weights",
            Self::Gradients => "gradients",
            Self::Moments => "moments",
            Self::ComputeCopy => "compute copy",
            Self::KeptActivations => "kept activations",
            Self::Head => "head",
            Self::Dropout => "dropout",
            Self::Temporaries => "temporaries",
            Self::Batch => "batch",
            Self::Workspaces => "workspaces",
        }
    }
}

/// The bytes of one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PartBytes {
    /// What for.
    pub part: MemoryPart,
    /// How many.
    pub bytes: i64,
}

/// The passes of a micro-batch. The update after the last of them needs less than any: nothing is kept any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Through the blocks.
    Forward,
    /// The head with its loss and gradient.
    Head,
    /// Back through the blocks.
    Backward,
}

impl Stage {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::Forward, Self::Head, Self::Backward];
}

/// The memory of one micro-batch's passes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passes {
    /// What is held before the micro-batch comes: weights, parameters, gradients, moments.
    pub lasting: i64,
    /// What is held between forward and the head.
    pub kept: i64,
    /// Each stage's peak, by part.
    pub peaks: [(Stage, Vec<PartBytes>); 3],
}

impl Passes {
    /// The peak of a stage.
    pub fn peak(&self, stage: Stage) -> i64 {
        let (_, parts) = &self.peaks[stage as usize];
        sum(parts)
    }
}

impl From<Passes> for Expected {
    fn from(passes: Passes) -> Self {
        let [forward, head, backward] = Stage::ALL.map(|stage| passes.peak(stage));
        Self { lasting: passes.lasting, kept: passes.kept, forward, head, backward }
    }
}

/// The bytes of all parts.
pub fn sum(parts: &[PartBytes]) -> i64 {
    parts.iter().map(|part| part.bytes).sum()
}
