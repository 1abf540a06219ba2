//! Why a row cannot be used, and where it stands.

use std::path::Path;

use crate::error::Fault;

/// Why a row or a file cannot be used, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// What was found and what was expected.
    pub what: String,
    /// What to change; may be empty.
    pub hint: String,
}

impl Reason {
    /// A reason that says all by itself.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), hint: String::new() }
    }

    /// Adds what to change.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: hint.into(), ..self }
    }
}

/// A fault at a row.
pub fn row_fault(file: &Path, line: u32, reason: &Reason) -> Fault {
    Fault::new(place(file, line), reason.what.as_str()).hint(reason.hint.as_str())
}

/// `file:line`.
pub fn place(file: &Path, line: u32) -> String {
    format!("{}:{line}", file.display())
}
