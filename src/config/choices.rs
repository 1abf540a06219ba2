//! Values of the config that are one of a few words.

/// A value written in the config as one of a few words.
pub(super) trait Choice: Copy + 'static {
    /// Every word with its meaning, in the order a message lists them.
    const WORDS: &'static [(&'static str, Self)];
}

/// Defines an enum whose variants are words of the config.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }

        impl Choice for $name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$variant),)+];
        }

        impl $name {
            /// Gives the word the config file uses.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }
    };
}

choice! {
    /// The type of frozen weights and activations.
    Dtype {
        /// 32-bit floats.
        Fp32 = "fp32",
        /// bfloat16.
        Bf16 = "bf16",
        /// 16-bit floats, with loss scaling.
        Fp16 = "fp16",
    }
}

impl std::str::FromStr for Dtype {
    type Err = &'static str;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let found = Self::WORDS.iter().find(|(known, _)| *known == word);
        found.map(|(_, dtype)| *dtype).ok_or("expected fp32, bf16 or fp16")
    }
}

choice! {
    /// Where to compute.
    Device {
        /// The processor.
        Cpu = "cpu",
        /// An NVIDIA GPU.
        Cuda = "cuda",
    }
}

choice! {
    /// What new rows of a grown vocabulary begin as.
    NewRows {
        /// Draws from N(0, initializer_range).
        Normal = "normal",
        /// The mean of the old rows.
        Mean = "mean",
    }
}

choice! {
    /// What happens to a sample longer than `max_length`.
    Truncation {
        /// It is left out before the order is made.
        Drop = "drop",
        /// Its end is cut off.
        Cut = "cut",
        /// The data is refused.
        Error = "error",
    }
}

choice! {
    /// What a special token written in a text becomes.
    SpecialTokens {
        /// Its id.
        Special = "special",
        /// The tokens of its letters.
        Text = "text",
    }
}

choice! {
    /// Which answers of a conversation are learned.
    Learn {
        /// The last one.
        Last = "last",
        /// Every one.
        All = "all",
    }
}

choice! {
    /// The shape of the learning rate after the warmup.
    Schedule {
        /// Half a cosine, from the peak to 0.
        Cosine = "cosine",
        /// A straight line, from the peak to 0.
        Linear = "linear",
        /// The peak.
        Constant = "constant",
    }
}

choice! {
    /// Over what the loss of an update is averaged.
    LossAverage {
        /// The label tokens of the global batch.
        Tokens = "tokens",
        /// Groups of samples, each by its own label tokens.
        Samples = "samples",
    }
}

choice! {
    /// What follows a loss or gradient that is not finite.
    NonFinite {
        /// The run ends.
        Stop = "stop",
        /// The update is passed over.
        Skip = "skip",
    }
}

choice! {
    /// Which activations are computed again in backward instead of kept.
    Recompute {
        /// None.
        Nothing = "none",
        /// Those of every layer.
        All = "all",
    }
}

choice! {
    /// The type of the trained tables in the final adapter.
    SaveDtype {
        /// 32-bit floats.
        Fp32 = "fp32",
        /// bfloat16.
        Bf16 = "bf16",
        /// 16-bit floats.
        Fp16 = "fp16",
    }
}
