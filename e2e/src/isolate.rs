//! Runs a lab inside namespaces of its own: network, so that nothing leaves the machine and labs do not meet; process,
//! so that the kernel ends everything when the lab's first process ends, however it ends; mount, so that no network
//! namespace's name and no scratch file outlives it.

use std::process::{Command, ExitStatus};

use anyhow::{Context, bail};

/// Set in the process that runs inside the namespaces.
const INSIDE: &str = "FENCELINE_LAB_INSIDE";

/// Where a lab keeps its files: in memory, gone with the lab.
pub const SCRATCH: &str = "/run/lab";
/// Where `.cache` of the checkout is seen from inside.
pub const TOOLS: &str = "/run/tools";

/// Whether this process already runs inside a lab's namespaces.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// The same program again, with `args`, as the first process of new namespaces.
///
/// # Errors
/// Fails when the program's own path is unknown.
pub fn command(args: &[&str]) -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("this program's path")?;
    // The kernel ends each with its parent (setpriv's pdeathsig, unshare's kill-child), and a process namespace with
    // its first process: so all ends however this one does.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "unshare"])
        .args([
            "--net",
            "--pid",
            "--mount",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
            "--",
        ])
        .arg(program)
        .args(args)
        .env(INSIDE, "1");
    Ok(command)
}

/// Runs the test of this name again inside namespaces of its own.
///
/// # Errors
/// Fails when the test does, or when namespaces cannot be made (it takes root).
pub fn run_test(name: &str) -> anyhow::Result<()> {
    let args = [name, "--exact", "--nocapture", "--include-ignored"];
    let status = command(&args)?
        .status()
        .context("could not start `unshare` (util-linux)")?;
    if !status.success() {
        bail!("{name} failed inside the lab: {}", explain(status));
    }
    Ok(())
}

fn explain(status: ExitStatus) -> String {
    match status.code() {
        Some(1) => "exit status 1 (if `unshare` was refused above: the lab needs root)".to_owned(),
        _ => status.to_string(),
    }
}

/// Prepares the namespaces from within: a loopback device, a private `/run` for names of network namespaces.
///
/// # Errors
/// Fails when a device or a mount is refused.
pub fn prepare() -> anyhow::Result<()> {
    run("ip", &["link", "set", "lo", "up"])?;
    run("mount", &["-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"])?;
    for folder in ["/run/netns", SCRATCH, TOOLS] {
        std::fs::create_dir_all(folder).with_context(|| format!("the folder {folder}"))?;
    }
    // Sidecars run as a user of their own, who may not be able to enter the checkout.
    let cache = crate::tools::checkout().join(".cache");
    std::fs::create_dir_all(&cache).context("the folder .cache")?;
    run("mount", &["--bind", &cache.to_string_lossy(), TOOLS]).map(drop)
}

/// Runs a short command to its end.
///
/// # Errors
/// Fails with what it printed when it cannot start or exits non-zero.
pub fn run(program: &str, args: &[&str]) -> anyhow::Result<String> {
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    let output = Command::new(program)
        .args(args)
        .env("PATH", path)
        .output()
        .with_context(|| format!("could not start {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{program} {}: {}: {}",
            args.join(" "),
            output.status,
            said.trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
