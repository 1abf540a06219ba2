//! Files of Hugging Face's kind: what of each is honoured, what is known to have no effect here, and what is refused.

pub mod json;
pub mod keys;
pub mod model_keys;
pub mod tokenizer_keys;
