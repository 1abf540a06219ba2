//! What is wrong with a path of a config.

/// A path that is as it should be, or what is wrong with it.
pub(super) type Checked<T> = Result<T, Problem>;

/// What is wrong with a path, and what to do.
pub(super) struct Problem {
    pub(super) what: String,
    pub(super) hint: String,
}

pub(super) fn problem<T>(what: String, hint: impl Into<String>) -> Checked<T> {
    Err(Problem { what, hint: hint.into() })
}
