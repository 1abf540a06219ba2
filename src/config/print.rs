//! A config as text: the run's own `config.toml`, and what `check --print-config` shows.

use super::raw::EITHER;
use super::{Config, KEYS};

impl Config {
    /// Gives the whole config as TOML, defaults included; it loads back to an equal config.
    pub fn to_toml(&self) -> String {
        self.render(|_| "")
    }

    /// Gives the whole config as TOML, with `# default` behind the keys that the user did not give.
    pub fn print_with_defaults_marked(&self) -> String {
        self.render(|key| if self.given.contains(key) { "" } else { "  # default" })
    }

    fn render(&self, mark: impl Fn(&str) -> &'static str) -> String {
        let mut text = String::new();
        let mut section = "";
        for (key, value) in self.entries() {
            let (of, name) = key.split_once('.').unwrap_or(("", key));
            if of != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                text.push_str(&format!("{gap}[{of}]\n"));
                section = of;
            }
            text.push_str(&format!("{name} = {value}{}\n", mark(key)));
        }
        text
    }

    /// Gives every key that holds with its value in TOML, section by section.
    pub(super) fn entries(&self) -> Vec<(&'static str, String)> {
        let mut entries: Vec<_> = KEYS.iter().filter_map(|key| Some((key.name, (key.print)(self)?))).collect();
        for (first, second) in EITHER {
            let has_second = entries.iter().any(|(key, _)| *key == second);
            entries.retain(|(key, _)| !(has_second && *key == first));
        }
        entries
    }
}
