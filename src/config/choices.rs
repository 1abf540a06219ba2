//! Values of the config that are one of a few words, and that nothing below the config knows by a name of its own.

use crate::choice::{Choice, choice};

choice! {
    /// A type of numbers.
    Dtype {
        /// 32-bit floats.
        Fp32 = "fp32",
        /// bfloat16.
        Bf16 = "bf16",
        /// 16-bit floats; computing in them takes loss scaling.
        Fp16 = "fp16",
    }
}

impl std::str::FromStr for Dtype {
    type Err = &'static str;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let known = Self::WORDS.iter().find(|(known, _)| *known == word).map(|(_, dtype)| *dtype);
        known.ok_or("expected fp32, bf16 or fp16")
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
