//! From data files to batches of tokens: [`rows`] finds rows and [`record`] reads them, [`template`] makes prompts of them,
//! [`tokenizer`] and [`encode`] make samples, [`dataset`] holds them (through the token cache), [`order`] says which samples
//! an update is made of, [`pack`] and [`batch`] spread them over micro-batches. [`lengths`] stands in for files where only
//! speed counts.
//!
//! Nothing here knows the model, prints, or reads the environment.

pub mod chat;
pub mod conversation;
pub mod prompting;
pub mod reason;
pub mod record;
pub mod rows;
pub mod template;
pub mod template_file;
pub mod tokenizer;

pub mod template_check;

pub mod encode;

mod brackets;
mod cache;
mod cache_room;
mod json;
mod learned;
mod samples;
mod split;

pub mod lengths;

pub mod dataset;

pub mod batch;
pub mod order;
pub mod pack;

pub use batch::{LossAverage, Share, build_batches, build_share};
pub use cache::TokenCache;
pub use chat::Answers;
pub use conversation::Conversation;
pub use dataset::{Dataset, Stats};
pub use encode::{Encoder, Truncation, prompt_ids};
pub use lengths::Lengths;
pub use order::EpochOrder;
pub use prompting::Prompting;
pub use record::Record;
pub use samples::DataSpec;
pub use template::Template;
pub use template_file::TemplateFile;
pub use tokenizer::{SpecialTokens, Tokenizer};
