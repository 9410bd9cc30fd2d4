//! The variables that lead the Vulkan loader and EGL to the unpacked drivers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::files::{files, library_folders, manifests, name, store};
use crate::manifest;

/// Set to anything, it keeps `env.sh` from changing a variable.
pub(crate) const OFF: &str = "GQA_NO_DRIVERS";

/// Where manifests of the machine's own Vulkan drivers lie.
pub(crate) const SYSTEM_VULKAN: [&str; 3] =
    ["/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/usr/share/vulkan/icd.d"];
const SYSTEM_EGL: [&str; 2] = ["/etc/glvnd/egl_vendor.d", "/usr/share/glvnd/egl_vendor.d"];

/// Where Chromium and its kin keep the third implementation of Vulkan.
const SWIFTSHADER: [&str; 4] = [
    "/usr/lib/chromium/libvk_swiftshader.so",
    "/usr/lib/chromium-browser/libvk_swiftshader.so",
    "/usr/lib64/chromium-browser/libvk_swiftshader.so",
    "/opt/google/chrome/libvk_swiftshader.so",
];

/// The driver folder: GQA_DRIVERS, or `target/gqa-drivers` of this repository.
pub(crate) fn folder() -> PathBuf {
    let chosen = std::env::var_os("GQA_DRIVERS").filter(|path| !path.is_empty()).map(PathBuf::from);
    let folder =
        chosen.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/gqa-drivers"));
    std::path::absolute(&folder).unwrap_or(folder)
}

/// Whether the kernel offers a GPU, with or without a driver for it.
pub(crate) fn has_gpu() -> bool {
    let render = files("/dev/dri".as_ref()).iter().any(|path| name(path).starts_with("renderD"));
    render || ["/dev/nvidia0", "/dev/dxg"].iter().any(|path| Path::new(path).exists())
}

/// `cargo xtask env`
pub(crate) fn print() -> Result<u8, String> {
    let folder = folder();
    if folder.join("env.sh").exists() {
        print!("{}", exports(&variables(&folder, &system())));
    } else {
        println!("# nothing to set: no drivers in {} (see `cargo xtask setup`)", folder.display());
    }
    Ok(0)
}

/// Writes the manifests and `env.sh`, which the runner in `.cargo/config.toml` reads.
pub(crate) fn write(folder: &Path) -> Result<(), String> {
    let libraries = library_folders(&folder.join("root"));
    manifest::rewrite(&folder.join("root/usr/share/vulkan/icd.d"), &folder.join("icd.d"), &libraries)?;
    manifest::rewrite(
        &folder.join("root/usr/share/glvnd/egl_vendor.d"),
        &folder.join("egl_vendor.d"),
        &libraries,
    )?;
    if let Some(library) = SWIFTSHADER.iter().find(|path| Path::new(path).exists()) {
        store(&folder.join("icd.d/swiftshader.json"), &manifest::vulkan(library))?;
    }
    let exports = exports(&variables(folder, &system()));
    store(
        &folder.join("env.sh"),
        &format!(
            "# Written by `cargo xtask setup`, read by the runner in .cargo/config.toml.\n\
             # xtask looks for drivers of its own accord.\n\
             case \"${{1-}}\" in */xtask) return 0 ;; esac\n\
             [ -z \"${{{OFF}-}}\" ] || return 0\n{exports}"
        ),
    )
}

/// Manifests of the machine's own drivers.
struct System {
    vulkan: Vec<PathBuf>,
    egl: Vec<PathBuf>,
    gpu: bool,
}

fn system() -> System {
    let all = |folders: &[&str]| folders.iter().flat_map(|folder| manifests(folder.as_ref())).collect();
    System { vulkan: all(&SYSTEM_VULKAN), egl: all(&SYSTEM_EGL), gpu: has_gpu() }
}

/// All variables to set, by name.
fn variables(folder: &Path, system: &System) -> BTreeMap<&'static str, String> {
    let mut variables = BTreeMap::new();
    let mut add = |name, paths: &[PathBuf]| {
        if !paths.is_empty() {
            let paths: Vec<_> = paths.iter().map(|path| path.to_string_lossy()).collect();
            variables.insert(name, paths.join(":"));
        }
    };
    let ours = manifests(&folder.join("icd.d"));
    if !ours.is_empty() {
        add("VK_DRIVER_FILES", &vulkan_order(ours, system));
    }
    let ours = manifests(&folder.join("egl_vendor.d"));
    if !ours.is_empty() {
        let others = system.egl.iter().filter(|path| !name(path).contains("mesa")).cloned();
        add("__EGL_VENDOR_LIBRARY_FILENAMES", &others.chain(ours).collect::<Vec<_>>());
    }
    let libraries = library_folders(&folder.join("root"));
    let dri: Vec<_> = libraries.iter().map(|path| path.join("dri")).filter(|path| path.is_dir()).collect();
    add("LIBGL_DRIVERS_PATH", &dri);
    add("LD_LIBRARY_PATH", &libraries);
    variables
}

/// The machine's own GPU drivers first, then lavapipe (the newer one), then SwiftShader.
fn vulkan_order(ours: Vec<PathBuf>, system: &System) -> Vec<PathBuf> {
    let is_lavapipe = |path: &&PathBuf| name(path).starts_with("lvp");
    let (swiftshader, mesa): (Vec<_>, Vec<_>) =
        ours.iter().partition(|path| name(path).starts_with("swiftshader"));
    let (lavapipe, hardware): (Vec<_>, Vec<_>) = mesa.into_iter().partition(is_lavapipe);
    let (system_lavapipe, system_hardware): (Vec<_>, Vec<_>) = system.vulkan.iter().partition(is_lavapipe);
    let mut order = system_hardware;
    // A GPU without a driver is served by what came with lavapipe.
    if order.is_empty() && system.gpu {
        order.extend(hardware);
    }
    order.extend(if lavapipe.is_empty() { system_lavapipe } else { lavapipe });
    order.extend(swiftshader);
    order.into_iter().cloned().collect()
}

/// Lines for a POSIX shell. What the user has chosen stays; libraries go in front.
fn exports(variables: &BTreeMap<&'static str, String>) -> String {
    let mut text = String::new();
    for (name, value) in variables {
        let value = quote(value);
        text += &match *name {
            "LD_LIBRARY_PATH" => format!("export {name}={value}\"${{{name}:+:${name}}}\"\n"),
            _ => format!("[ -n \"${{{name}-}}\" ] || export {name}={value}\n"),
        };
    }
    text
}

fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn own_drivers_come_first_and_old_lavapipe_goes() {
        let ours = || paths(&["o/lvp_icd.json", "o/radeon_icd.json", "o/swiftshader.json"]);
        let order = |system: &[&str], gpu| {
            vulkan_order(ours(), &System { vulkan: paths(system), egl: Vec::new(), gpu })
        };
        let software = paths(&["o/lvp_icd.json", "o/swiftshader.json"]);
        assert_eq!(order(&[], false), software);
        assert_eq!(order(&["s/lvp_icd.json"], false), software);
        assert_eq!(order(&[], true)[0], PathBuf::from("o/radeon_icd.json"));
        assert_eq!(
            order(&["s/nvidia_icd.json", "s/lvp_icd.json"], true)[0],
            PathBuf::from("s/nvidia_icd.json")
        );
        assert_eq!(order(&["s/nvidia_icd.json", "s/lvp_icd.json"], true)[1..], software);
    }

    #[test]
    fn own_lavapipe_stays_where_none_was_unpacked() {
        let system = System { vulkan: paths(&["s/lvp_icd.json"]), egl: Vec::new(), gpu: false };
        let order = vulkan_order(paths(&["o/swiftshader.json"]), &system);
        assert_eq!(order, paths(&["s/lvp_icd.json", "o/swiftshader.json"]));
    }

    #[test]
    fn exports_keep_the_users_choice() {
        let variables =
            BTreeMap::from([("LD_LIBRARY_PATH", "/it's".into()), ("VK_DRIVER_FILES", "/a:/b".into())]);
        let wanted = "export LD_LIBRARY_PATH='/it'\\''s'\"${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}\"\n\
                      [ -n \"${VK_DRIVER_FILES-}\" ] || export VK_DRIVER_FILES='/a:/b'\n";
        assert_eq!(exports(&variables), wanted);
    }
}
