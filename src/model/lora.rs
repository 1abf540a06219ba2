//! Which weights are adapted, and by what: the names of PEFT's `adapter_config.json`.

use crate::model::shape::{Projection, Table};

/// The prefix that PEFT puts before every key of an adapter file.
pub const PEFT_PREFIX: &str = "base_model.model.";

/// The adapters of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSpec {
    /// Rank `R`.
    pub r: i64,
    /// `lora_alpha`.
    pub alpha: f64,
    /// Dropout on the input of `A`.
    pub dropout: f64,
    /// Scale by `alpha / sqrt(r)` instead of `alpha / r`.
    pub use_rslora: bool,
    /// Adapted projections, ascending.
    pub target_modules: Vec<Projection>,
    /// Tables trained whole, ascending.
    pub modules_to_save: Vec<Table>,
}

impl LoraSpec {
    /// No adapters at all: the base as it is.
    pub fn none() -> Self {
        Self {
            r: 1,
            alpha: 1.0,
            dropout: 0.0,
            use_rslora: false,
            target_modules: Vec::new(),
            modules_to_save: Vec::new(),
        }
    }

    /// The factor on `B A`.
    pub fn scale(&self) -> f64 {
        if self.use_rslora { self.alpha / (self.r as f64).sqrt() } else { self.alpha / self.r as f64 }
    }

    /// Whether a table is trained.
    pub fn trains(&self, table: Table) -> bool {
        self.modules_to_save.contains(&table)
    }

    /// Whether a projection is adapted.
    pub fn adapts(&self, projection: Projection) -> bool {
        self.target_modules.contains(&projection)
    }
}
