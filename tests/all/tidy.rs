//! Rules that hold for the files of the project as a whole.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The modules from the lowest layer up.
///
/// A module uses lower layers; those of one layer do not know each other, but for what [`SIBLINGS`] says.
const LAYERS: [&[&str]; 6] = [
    &["error", "choice", "progress", "disk", "torch", "device"],
    &["ops", "comm", "formats", "batch"],
    &["model", "data"],
    &["engine", "checkpoint"],
    &["config", "log", "plan", "eval", "run", "trained", "generate", "export", "bench", "selftest"],
    &["cli"],
];

/// Who may use whom within a layer.
const SIBLINGS: [(&str, &[&str]); 10] = [
    ("disk", &["error"]),
    ("torch", &["error"]),
    ("device", &["torch"]),
    ("batch", &["ops"]),
    // What config.json says of rotations and heads.
    ("formats", &["ops"]),
    // A checkpoint keeps where a training stands.
    ("checkpoint", &["engine"]),
    ("run", &["config", "log", "plan", "eval"]),
    // What is opened for use is what training wrote.
    ("trained", &["config", "plan", "run"]),
    ("export", &["trained"]),
    ("bench", &["config", "log", "plan", "run"]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files of the project: those that git knows or would take, or all but the ignored folders without git.
fn files() -> Vec<PathBuf> {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output();
    if let Ok(output) = listed
        && output.status.success()
    {
        let names = String::from_utf8(output.stdout).unwrap();
        return names.split('\0').filter(|n| !n.is_empty()).map(|n| root().join(n)).filter(|p| p.is_file()).collect();
    }
    let ignored = ["target", ".libtorch", ".models", ".venv", "runs", ".git"];
    let (mut found, mut folders) = (Vec::new(), vec![root().to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                found.push(path);
            } else if !ignored.iter().any(|name| path == root().join(name)) {
                folders.push(path);
            }
        }
    }
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_string_lossy().into_owned()
}

/// The product's source files: names and contents, tests and comments within them left out.
fn sources() -> Vec<(String, String)> {
    let is_source = |path: &PathBuf| relative(path).starts_with("src/") && path.extension().is_some_and(|e| e == "rs");
    files()
        .into_iter()
        .filter(is_source)
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            let lines = code.lines().map(|line| match line.trim_start().starts_with("//") {
                true => "\n".to_string(),
                false => format!("{line}\n"),
            });
            (relative(&path), lines.collect())
        })
        .collect()
}

/// Finds words in the product's code, except in files that begin with one of `but`.
fn found_in_sources(words: &[&str], but: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (name, code) in sources() {
        if but.iter().any(|allowed| name.starts_with(allowed)) {
            continue;
        }
        for (line, text) in (1..).zip(code.lines()) {
            found.extend(words.iter().filter(|w| text.contains(**w)).map(|w| format!("{name}:{line}: {w}")));
        }
    }
    found
}

#[track_caller]
fn assert_none(found: &[String]) {
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

/// The modules at the top that a line of code names: `crate::a::b`, or each of `crate::{a::b, c}`.
fn named_modules(code: &str) -> Vec<String> {
    let mut named = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        match rest.strip_prefix('{') {
            None => named.push(rest.split(|c| !is_name(c)).next().unwrap_or_default().to_string()),
            Some(list) => {
                let (mut depth, mut item) = (0, String::new());
                for c in list.chars() {
                    match c {
                        '}' if depth == 0 => break,
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 0 => named.push(std::mem::take(&mut item)),
                        c => item.push(c),
                    }
                }
                named.push(item);
                let first = |name: &String| name.trim().split(|c| !is_name(c)).next().unwrap_or_default().to_string();
                named = named.iter().map(first).collect();
            }
        }
    }
    named
}

#[test]
fn modules_use_lower_layers_only() {
    let layer = |module: &str| LAYERS.iter().position(|layer| layer.contains(&module));
    let mut wrong = Vec::new();
    for (name, code) in sources() {
        let module = name["src/".len()..].split(['/', '.']).next().unwrap().to_string();
        if ["lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let Some(own) = layer(&module) else {
            wrong.push(format!("{name}: {module} has no layer here"));
            continue;
        };
        let siblings = SIBLINGS.iter().find(|(of, _)| *of == module).map_or(&[][..], |(_, may)| may);
        for used in named_modules(&code) {
            match layer(&used) {
                Some(theirs) if theirs < own || used == module || siblings.contains(&used.as_str()) => {}
                _ => wrong.push(format!("{name} uses {used}")),
            }
        }
    }
    assert_none(&wrong);
    let declared = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    for module in LAYERS.iter().copied().flatten() {
        assert!(declared.contains(&format!("pub mod {module};")), "{module} is not in lib.rs");
    }
}

/// The paths that `use` statements and expressions of a file name, from `crate` on: `a::b::C` for `crate::a::{b::C, d}`, and
/// for `super::` and `self::` as seen from `module`.
fn used_paths(module: &[&str], code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for (root, above) in [("crate::", module.len()), ("super::", 1), ("self::", 0)] {
        for (at, _) in code.match_indices(root) {
            let is_whole = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            if is_whole {
                let base = module[..module.len() - above].iter().map(ToString::to_string).collect();
                expand(base, &code[at + root.len()..], &mut found);
            }
        }
    }
    found
}

/// Follows a path, and every branch where it opens a brace; gives what is left of the text behind it.
fn expand<'a>(mut path: Vec<String>, mut rest: &'a str, found: &mut Vec<Vec<String>>) -> &'a str {
    loop {
        rest = rest.trim_start();
        if let Some(mut list) = rest.strip_prefix('{') {
            loop {
                list = expand(path.clone(), list, found).trim_start();
                match list.chars().next() {
                    Some(',') => list = &list[1..],
                    Some('}') => return &list[1..],
                    _ => return list,
                }
            }
        }
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
        path.push(rest[..end].to_owned());
        rest = &rest[end..];
        match rest.strip_prefix("::") {
            Some(more) => rest = more,
            None => {
                found.push(path);
                return rest;
            }
        }
    }
}

#[test]
fn no_files_use_each_other() {
    let sources = sources();
    let module = |name: &str| -> Vec<String> {
        let path = name["src/".len()..].trim_end_matches(".rs").trim_end_matches("/mod");
        path.split('/').map(ToString::to_string).collect()
    };
    // A room's mod.rs names its files: what a file takes from there does not count.
    let files: Vec<Vec<String>> =
        sources.iter().filter(|(name, _)| !name.ends_with("/mod.rs")).map(|(name, _)| module(name)).collect();
    let file_of = |path: &[String]| (1..=path.len()).rev().find_map(|n| files.iter().position(|f| f[..] == path[..n]));
    let mut uses = vec![Vec::new(); files.len()];
    for (name, code) in &sources {
        let own = module(name);
        let Some(at) = files.iter().position(|file| *file == own) else { continue };
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        uses[at].extend(used_paths(&own, code).iter().filter_map(|path| file_of(path)).filter(|used| *used != at));
    }
    // Files that use none of those left, or are used by none, are taken away, over and over: what stays is circles.
    let mut left: Vec<usize> = (0..files.len()).collect();
    loop {
        let is_used = |at: &usize| left.iter().any(|other| uses[*other].contains(at));
        let is_free = |at: &usize| !is_used(at) || !uses[*at].iter().any(|used| left.contains(used));
        let (free, rest): (Vec<usize>, Vec<usize>) = left.iter().copied().partition(is_free);
        left = rest;
        if free.is_empty() {
            break;
        }
    }
    let shown = |at: usize| files[at].join("::");
    let named = |at: &usize| {
        let used: Vec<String> = uses[*at].iter().filter(|used| left.contains(used)).map(|used| shown(*used)).collect();
        format!("{} uses {}", shown(*at), used.join(", "))
    };
    assert_none(&left.iter().map(named).collect::<Vec<_>>());
}

#[test]
fn the_map_names_what_is_there() {
    let map = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let lib = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let modules = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    let mut wrong = Vec::new();
    for module in modules {
        if !map.contains(&format!("`{module}`")) && !map.contains(&format!("`{module}/`")) {
            wrong.push(format!("src/{module} is not on the map"));
        }
    }
    for quoted in map.split('`').skip(1).step_by(2) {
        let is_source = [".rs", ".cpp", ".h"].iter().any(|end| quoted.ends_with(end)) && quoted.contains('/');
        let path = if quoted.starts_with("src/") { quoted.to_owned() } else { format!("src/{quoted}") };
        if is_source && !root().join(&path).is_file() {
            wrong.push(format!("{quoted} is not there"));
        }
    }
    assert_none(&wrong);
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    let rooms = ["src/torch/", "src/comm/nccl/", "src/formats/safetensors_in.rs", "src/data/cache.rs"];
    assert_none(&found_in_sources(&["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe_code"], &rooms));
    for (name, code) in sources() {
        let text = std::fs::read_to_string(root().join(&name)).unwrap();
        let blocks = code.matches("unsafe {").count();
        assert!(text.matches("// SAFETY:").count() >= blocks, "{name}: an unsafe block without its SAFETY line");
    }
}

#[test]
fn only_the_command_line_prints_exits_and_reads_the_environment() {
    let printing = ["println!", "print!(", "eprint", "dbg!", "std::io::stderr", "std::io::stdout", "io::stdout()"];
    assert_none(&found_in_sources(&printing, &["src/cli/", "src/log/console.rs"]));
    let environment = ["std::env::", "env::var", "process::exit", "process::abort", "ExitCode"];
    assert_none(&found_in_sources(&environment, &["src/cli/", "src/main.rs", "src/config/paths.rs"]));
    // No taped autograd: gradients are written out.
    assert_none(&found_in_sources(&[".backward()", "f_backward", "requires_grad", "run_backward"], &[]));
}

/// tch's fallible methods that take a number as a `Scalar`, by the source of the version that is built.
fn methods_with_a_scalar() -> Vec<String> {
    // Without a platform cargo asks for crates of others, which are not there.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let listed = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--filter-platform", &platform])
        .current_dir(root())
        .output()
        .unwrap();
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let tch = listed["packages"].as_array().unwrap().iter().find(|package| package["name"] == "tch").unwrap();
    let manifest = Path::new(tch["manifest_path"].as_str().unwrap());
    let generated = manifest.with_file_name("src/wrappers/tensor_fallible_generated.rs");
    let text = std::fs::read_to_string(generated).unwrap();
    let with_a_scalar = text.split("pub fn ").filter(|it| it.split('{').next().unwrap().contains("Into<Scalar>"));
    with_a_scalar.map(|it| it.split(['<', '(']).next().unwrap().to_string()).collect()
}

/// A `Scalar` that is dropped after a call that failed panics: memory that runs out would end the program.
#[test]
fn no_number_goes_to_libtorch_as_a_scalar() {
    let methods = methods_with_a_scalar();
    assert!(methods.len() > 100 && methods.contains(&"f_mul_scalar_".to_string()), "{methods:?}");
    let calls: Vec<String> =
        methods.iter().flat_map(|name| [format!(".{name}("), format!("::{name}("), format!("::{name}::")]).collect();
    let calls: Vec<&str> = calls.iter().map(String::as_str).collect();
    assert_none(&found_in_sources(&calls, &[]));
    // These panic by themselves where they fail.
    assert_none(&found_in_sources(&["Tensor::from(", "Tensor::from_slice(", ".copy()", "Tensor::zeros("], &[]));
}

#[test]
fn nothing_is_left_to_do_and_no_machine_is_named() {
    let mut found = Vec::new();
    let open = ["TODO", "FIXME", "XXX", "todo!", "unimplemented!"].map(|w| w.to_string());
    // Put together here, so that this file does not hold them itself.
    let machine = ["/ho", "/ro", "/wo", "/Us", "/mn"].iter().zip(["me/", "ot/", "rk/", "ers/", "t/"]);
    let machine: Vec<String> = machine.map(|(a, b)| format!("{a}{b}")).collect();
    for path in files() {
        let name = relative(&path);
        let is_text = ["rs", "toml", "sh", "py", "md", "cpp", "yml", "json", "jsonl"]
            .iter()
            .any(|e| path.extension().is_some_and(|x| x == *e));
        // Names of tokens and words of samples are no remarks.
        if !is_text || name.starts_with("tests/golden/") || name.starts_with("data/") || name.ends_with("tidy.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for (line, text) in (1..).zip(text.lines()) {
            let words = open.iter().chain(&machine);
            found.extend(words.filter(|w| text.contains(w.as_str())).map(|w| format!("{name}:{line}: {w}")));
        }
    }
    assert_none(&found);
}

#[test]
fn files_are_small() {
    let too_large = |path: &PathBuf| std::fs::metadata(path).unwrap().len() > 1 << 20;
    let found: Vec<String> = files().iter().filter(|p| too_large(p)).map(|p| relative(p)).collect();
    assert_none(&found);
}

/// Which form of an op runs is said by its target alone.
#[test]
fn no_op_looks_at_a_tensor_for_its_device() {
    let of_ops: Vec<_> = sources().into_iter().filter(|(name, _)| name.starts_with("src/ops/")).collect();
    assert!(of_ops.len() > 8, "{}", of_ops.len());
    let looks = |line: &&str| line.contains(".device() ==") || line.contains(".device().is_cuda()");
    let found = of_ops
        .iter()
        .flat_map(|(name, code)| code.lines().filter(looks).map(move |line| format!("{name}: {}", line.trim())));
    assert_none(&found.collect::<Vec<_>>());
}
