//! Numbers at the ends of their ranges: each option and key takes them or refuses them by name, and nothing else happens.

use bellora::config::{Config, KEYS, Named};
use bellora::error::Error;
use bellora::run::banner;
use bellora::run::setup::{CacheUse, Job};

use crate::support::{Lab, Ran, Shape, bellora, run};

/// Values that no key may stumble over: the ends of integers and floats, and what lies beyond.
const VALUES: [&str; 14] = [
    "0",
    "1",
    "-1",
    "2147483648",
    "4294967296",
    "1099511627776",
    "9e18",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999999999",
    "1e-300",
    "1e300",
    "nan",
    "inf",
];

/// A result, or a refusal that names `culprit`.
#[track_caller]
fn assert_settled(what: &str, culprit: &str, ran: &Ran) {
    assert!(matches!(ran.code, Some(0 | 2)), "{what}: {:?} {}", ran.code, ran.stderr);
    assert!(!ran.stderr.contains("defect"), "{what}: {}", ran.stderr);
    if ran.code == Some(2) {
        assert!(ran.stderr.contains(culprit), "{what}: {}", ran.stderr);
    }
    assert_no_negative(what, &ran.stdout);
}

#[track_caller]
fn assert_no_negative(what: &str, said: &str) {
    let is_negative =
        |word: &str| word.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let negative = said.split_whitespace().find(|word| is_negative(word));
    assert!(negative.is_none(), "{what}: {negative:?} in {}", said);
}

/// What `check` makes of a config, in this process: hundreds of values are tried.
fn checked(config: Result<Config, Error>) -> Result<String, Error> {
    let job = Job::inspect(config?, CacheUse::Off, 1)?;
    job.run_bytes().total();
    Ok(banner::lines(&job)?.join("\n"))
}

#[test]
fn every_key_with_a_number() {
    let lab = Lab::new(Shape::default());
    let file = lab.config_file();
    // Files and folders are no numbers, and are looked for.
    for key in KEYS.iter().filter(|key| (key.named)() == Named::Nothing).map(|key| key.name) {
        for value in VALUES {
            let list = matches!(key, "train.betas" | "train.keep_steps");
            let values =
                if list { vec![format!("[{value}]"), format!("[{value}, {value}]")] } else { vec![value.to_owned()] };
            for value in values {
                let set = format!("{key}={value}");
                let (_, name) = key.split_once('.').unwrap();
                match checked(Config::load(&file, std::slice::from_ref(&set))) {
                    Ok(said) => assert_no_negative(&set, &said),
                    Err(error) => {
                        assert_eq!(error.exit_code(), 2, "{set}: {error}");
                        assert!(error.to_string().contains(name), "{set}: {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_option_with_a_number() {
    let lab = Lab::new(Shape::default());
    let config = lab.config_file();
    let base = lab.path("base");
    let (config, base) = (config.to_str().unwrap(), base.to_str().unwrap());
    let generate = ["generate", base, "--prompt", "q"];
    let short = [&generate[..], &["--max-new-tokens", "1"]].concat();
    let calls: [(&[&str], &str); 16] = [
        (&["train", config, "--nproc", "1"], "--meet-timeout"),
        (&["train", config, "--nproc", "1"], "--hang-timeout"),
        (&["train", config, "--nproc", "1"], "--link-timeout"),
        (&["train", config, "--nproc", "1"], "--max-restarts"),
        (&["train", config], "--nnodes"),
        (&["train", config, "--nnodes", "1"], "--node-rank"),
        (&["plan", config, "--gpu", "A100-80"], "--n-gpus"),
        (&["plan", config, "--shape", "tiny"], "--vocab-size"),
        (&["bench", "--shape", "tiny", "--warmup", "0", "--lengths", "8"], "--updates"),
        (&["bench", "--shape", "tiny", "--updates", "1", "--lengths", "8"], "--warmup"),
        (&["bench", "--shape", "tiny", "--updates", "1", "--warmup", "0", "--lengths", "8"], "--micro-batch-tokens"),
        (&generate, "--max-new-tokens"),
        (&short, "--temperature"),
        (&short, "--top-p"),
        (&short, "--top-k"),
        (&short, "--seed"),
    ];
    for (call, option) in calls {
        for value in ["-1", "9e18", "18446744073709551615", "99999999999999999999999999", "nan"] {
            let mut process = bellora();
            process.args(call).arg(format!("{option}={value}"));
            if call[0] == "train" {
                // The run's place is taken, so that no more than the options is judged.
                std::fs::create_dir_all(lab.path("run")).unwrap();
                std::fs::write(lab.path("run/config.toml"), "").unwrap();
            }
            let ran = run(&mut process);
            let culprit = if call[0] == "train" { "" } else { option };
            assert_settled(&format!("{option}={value}"), culprit, &ran);
        }
    }
}
