//! `bellora prepare`.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use clap::Args;

use crate::cli::{ConfigArgs, say};
use crate::error::{Error, Result};
use crate::train::setup::ModelSetup;

#[derive(Debug, Args)]
pub(super) struct PrepareArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Also write every sample as a line {"input_ids":[],"labels":[]}, in file order
    #[arg(long, value_name = "FILE")]
    dump: Option<PathBuf>,
}

pub(super) fn run(args: &PrepareArgs) -> Result<()> {
    let model = ModelSetup::inspect(args.config.load()?)?;
    let data = &model.config.data;
    let dataset = model.dataset(&data.train, Some(&data.cache_dir))?;
    if let Some(path) = &args.dump {
        let file = File::create(path).map_err(Error::io("create", path))?;
        dataset.write_dump(&mut BufWriter::new(file)).map_err(Error::io("write", path))?;
    }
    let stats = dataset.stats();
    say(&format!(
        "{} samples, {} tokens, {} learned; {} of {} rows dropped, {} cut, {} bad{}\n",
        stats.samples,
        stats.tokens,
        stats.label_tokens,
        stats.dropped,
        stats.rows,
        stats.cut,
        stats.bad_rows,
        if stats.from_cache { "; from the token cache" } else { "" },
    ));
    Ok(())
}
