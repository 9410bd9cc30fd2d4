//! `--adapter`, the same for every command.

use std::panic::resume_unwind;

use gqa::verify::{AdapterChoice, Gpu, adapters, lacking};

use crate::Failure;

/// Which adapter a command runs on.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct AdapterArgs {
    /// Adapter by index or by part of its name (`gqa info` lists them; of numbers a whole one, e.g. 4090), or `all` where a command takes
    /// several. Default: $WGPU_ADAPTER_NAME, else the best
    #[arg(long, value_name = "INDEX|NAME|all")]
    adapter: Option<AdapterChoice>,
}

/// An adapter's index, and its device.
type Indexed = (usize, Result<Gpu, Failure>);

impl AdapterArgs {
    /// Opens the chosen adapters: at least one.
    pub(crate) fn open(&self) -> Result<Vec<Gpu>, Failure> {
        self.open_indexed(AdapterChoice::Best)?.into_iter().map(|(_, gpu)| gpu).collect()
    }

    /// Opens the chosen adapters, or `default`: each with its index, and the reason where one cannot be opened.
    pub(crate) fn open_indexed(&self, default: AdapterChoice) -> Result<Vec<Indexed>, Failure> {
        let all = adapters();
        if all.is_empty() {
            let lacking = lacking();
            return Err(Failure::Adapter(match lacking.is_empty() {
                true => no_adapter().to_owned(),
                false => format!("no adapter can run these kernels:\n  {}", lacking.join("\n  ")),
            }));
        }
        let choice = self.adapter.as_ref().unwrap_or(&default);
        let picked = choice.pick(&all);
        if picked.is_empty() {
            return Err(Failure::Adapter(format!(
                "no adapter matches {choice}: `gqa info` lists those of this machine"
            )));
        }
        let open = |index: usize| {
            let name = all[index].get_info().name;
            Gpu::open(&all[index]).map_err(|e| Failure::Adapter(format!("{name} cannot be opened: {e}")))
        };
        Ok(picked.into_iter().map(|index| (index, open(index))).collect())
    }

    /// Opens the one adapter that is chosen.
    pub(crate) fn open_one(&self) -> Result<Gpu, Failure> {
        let mut gpus = self.open()?;
        match (gpus.pop(), gpus.is_empty()) {
            (Some(gpu), true) => Ok(gpu),
            _ => Err(Failure::Usage(
                "this command takes one adapter: name it by --adapter (`gqa info` lists them)".to_owned(),
            )),
        }
    }
}

/// What `run` gives for each adapter, in their order. All at once: most of the time goes to the drivers' compilers, and each keeps one
/// core busy.
pub(crate) fn side_by_side<T: Send>(
    gpus: &[Gpu],
    run: impl Fn(&Gpu) -> Result<T, Failure> + Sync,
) -> Result<Vec<T>, Failure> {
    let run = &run;
    std::thread::scope(|scope| {
        let runs: Vec<_> = gpus.iter().map(|gpu| scope.spawn(move || run(gpu))).collect();
        runs.into_iter().map(|run| run.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// What to do where there is no adapter at all.
fn no_adapter() -> &'static str {
    if cfg!(target_os = "linux") {
        "no adapter found. In a checkout, `cargo xtask setup` unpacks a software driver without root. Or install a driver:\n  \
         Debian, Ubuntu: apt install mesa-vulkan-drivers\n  Fedora: dnf install mesa-vulkan-drivers\n  \
         Arch: pacman -S vulkan-swrast (software), or the vulkan package of your GPU"
    } else if cfg!(windows) {
        "no adapter found: install the driver of your GPU; Windows 10 and later bring WARP, a software adapter for DX12"
    } else {
        "no adapter found: macOS 10.13 and later have Metal on every supported Mac"
    }
}
