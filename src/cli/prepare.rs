//! `bellora prepare`.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::cli::{ConfigArgs, say, signals};
use crate::config::{CacheDir, Config};
use crate::data::TokenCache;
use crate::error::{Error, Result};
use crate::log::show_progress;
use crate::run::setup::ModelSetup;

#[derive(Debug, Args)]
pub(super) struct PrepareArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Also write every sample as a line {"input_ids":[],"labels":[]}, in file order
    #[arg(long, value_name = "FILE")]
    dump: Option<PathBuf>,
}

pub(super) fn run(args: &PrepareArgs) -> Result<()> {
    signals::end_at_once()?;
    show_progress();
    let config = args.config.load_to_read()?;
    if let Some(path) = &args.dump {
        check_dump(path, &args.config.config, &config)?;
    }
    let model = ModelSetup::inspect(config, 1)?;
    let data = &model.config.data;
    // Without a dump, tokens that cannot be kept would be made for nothing.
    let CacheDir { folder, max_bytes, is_required, unwritable } = model.config.cache_dir()?;
    let is_required = is_required || args.dump.is_none();
    let cache = match unwritable {
        Some(fault) if is_required => return Err(Error::Invalid(vec![fault])),
        Some(fault) => {
            say(&format!("warning: {}\n", fault.in_one_line()));
            TokenCache::Read(folder)
        }
        None => TokenCache::Keep { folder, is_required, max_bytes },
    };
    let dataset = model.dataset(&data.train, cache)?;
    for warning in model.warnings.iter().chain(dataset.warnings()) {
        say(&format!("warning: {}\n", warning.in_one_line()));
    }
    if let Some(path) = &args.dump {
        let file = File::create(path).map_err(Error::io("create", path))?;
        if let Err(error) = dataset.write_dump(&mut BufWriter::new(&file)) {
            // A part of a dump is worse than none. A pipe or a device stays.
            if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
                let _ = std::fs::remove_file(path);
            }
            return Err(Error::io("write", path)(error));
        }
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

/// Refuses a dump that cannot be written, or that would take the place of what it is made from.
fn check_dump(path: &Path, config_file: &Path, config: &Config) -> Result<()> {
    let refused = |what: String| Err(Error::invalid("--dump", what).hint("name another file"));
    let absolute = std::path::absolute(path).map_err(Error::io("resolve", path))?;
    if path.is_dir() || !absolute.parent().is_some_and(Path::is_dir) {
        return refused(format!("{} is no place for a file", path.display()));
    }
    let is_same = |other: &Path| path.canonicalize().is_ok_and(|path| other.canonicalize().is_ok_and(|o| o == path));
    let inputs = config.data.train.iter().chain(&config.data.validation).map(|p| p.as_path());
    if inputs.chain([config_file]).any(is_same) {
        return refused(format!("{} is one of the files that are read", path.display()));
    }
    Ok(())
}
