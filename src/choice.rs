//! Settings that are one of a few words: an enum and its words, for whoever acts on it and for the config that reads it.

/// A value that is written as one of a few words.
pub trait Choice: Copy + 'static {
    /// Every word with its meaning, in the order a message lists them.
    const WORDS: &'static [(&'static str, Self)];

    /// Gives the word.
    fn as_str(self) -> &'static str;
}

/// Defines an enum whose variants are words.
macro_rules! choice {
    ($(#[$attribute:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }

        impl $crate::choice::Choice for $name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$variant),)+];

            fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }
    };
}

pub(crate) use choice;
