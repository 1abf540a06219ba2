//! Panics: a defect of this program or of a library it uses, told like any other failure.

use std::any::Any;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// The newest panic. Nothing is printed when it happens: whoever catches it may know what it means.
static NEWEST: Mutex<String> = Mutex::new(String::new());

/// Runs a command; a panic that nobody has caught becomes an error.
pub(super) fn caught(command: impl FnOnce() -> Result<()>) -> Result<()> {
    set_hook(Box::new(remember));
    catch_unwind(AssertUnwindSafe(command)).unwrap_or_else(|_| {
        let what = NEWEST.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Err(meaning(&what))
    })
}

/// The error behind a panic. tch panics with libtorch's error, instead of giving it, where an operation that fails has a
/// number among its arguments: memory that runs out comes either way.
fn meaning(what: &str) -> Error {
    match what.split_once("Torch(\"") {
        Some((_, said)) => Error::Torch(said.split(['\\', '"']).next().unwrap_or_default().to_string()),
        None => {
            Error::failed("a defect of bellora", what).hint("report it with the command, the config and this message")
        }
    }
}

fn remember(panic: &PanicHookInfo<'_>) {
    let place = panic.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
    let text = format!("{}{place}", first_line(panic.payload()));
    *NEWEST.lock().unwrap_or_else(PoisonError::into_inner) = text;
}

fn first_line(payload: &dyn Any) -> &str {
    let text = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text.as_str(),
        (None, None) => "for a reason unknown",
    };
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_with_its_first_line_and_place() {
        let error = caught(|| panic!("one\ntwo")).expect_err("it panicked");
        let _ = std::panic::take_hook();
        assert_eq!(error.exit_code(), 1);
        let text = error.to_string();
        assert!(text.starts_with("a defect of bellora: one (src/cli/defects.rs:"), "{text}");
        assert!(!text.contains("two"));
    }

    #[test]
    fn an_error_of_libtorch_that_came_as_a_panic_is_told_as_one() {
        let panic = "called `Result::unwrap()` on an `Err` value: Torch(\"can't allocate memory: 9 bytes\\nframe #0\")";
        let error = meaning(panic);
        assert_eq!(error.to_string(), "libtorch: can't allocate memory: 9 bytes");
        assert!(error.advice().contains("memory"));
    }
}
