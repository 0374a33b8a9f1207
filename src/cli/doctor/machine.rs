//! What the system says about the machine. Linux says most; other systems leave blanks.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use super::super::common::bytes;
use crate::plan::memory::in_kib;

/// A machine, as far as it can be seen.
#[derive(Default)]
pub(super) struct Machine {
    cpu: Option<String>,
    /// Instruction sets that kernels have a use for, of those that the CPU has.
    features: Vec<&'static str>,
    /// CPUs of the system, hardware threads included.
    cpus: usize,
    memory: Option<u64>,
    available: Option<u64>,
    swap: Option<u64>,
    swap_free: Option<u64>,
    /// Bytes that a process may lock into memory; `None` for any number.
    lockable: Option<u64>,
    /// `always`, `madvise` or `never`. No warning: kernels read pages of 4 KiB as fast as huge ones.
    huge_pages: Option<String>,
    governor: Option<String>,
    on_battery: bool,
    /// Programs that want a CPU, on average of the last minute.
    load: Option<f64>,
    /// CPUs that a quota (of a container, say) leaves.
    quota: Option<f64>,
    /// What is in the machine beside the CPU.
    pub(super) gpus: Vec<String>,
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// What lies in a folder, sorted.
fn entries(folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

impl Machine {
    /// Looks around; `threads` are going to work.
    pub(super) fn look(threads: usize) -> Self {
        let info = read("/proc/meminfo").unwrap_or_default();
        let huge_pages = read("/sys/kernel/mm/transparent_hugepage/enabled");
        let load = read("/proc/loadavg");
        let cpus = std::thread::available_parallelism().map_or(threads, usize::from);
        Self {
            cpu: cpu_name(),
            features: features(),
            cpus,
            memory: in_kib(&info, "MemTotal:"),
            available: in_kib(&info, "MemAvailable:"),
            swap: in_kib(&info, "SwapTotal:"),
            swap_free: in_kib(&info, "SwapFree:"),
            lockable: lockable(),
            huge_pages: huge_pages.as_deref().and_then(chosen).map(str::to_owned),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            on_battery: on_battery(),
            load: load.and_then(|load| load.split(' ').next()?.parse().ok()),
            quota: read("/sys/fs/cgroup/cpu.max").as_deref().and_then(quota),
            gpus: gpus(),
        }
    }

    /// What slows a model down and can be helped.
    pub(super) fn warnings(&self, threads: usize) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut warn = |text: String| warnings.push(text);
        if let Some(quota) = self.quota.filter(|&quota| quota < threads as f64) {
            warn(format!(
                "a quota leaves {quota:.1} CPUs to {threads} threads: raise it, or take fewer with -t"
            ));
        }
        if let Some(load) = self
            .load
            .filter(|&load| load > 0.5 * self.cpus as f64 && load >= 1.0)
        {
            warn(format!(
                "others are at work (load {load:.1} on {} CPUs): the figures below are lower than they could be",
                self.cpus
            ));
        }
        if self.on_battery {
            warn("on battery: CPUs run slower than at the mains".to_owned());
        }
        if self.governor.as_deref() == Some("powersave") && !has_own_governor() {
            warn("CPU governor powersave keeps the clock low; `cpupower frequency-set -g performance` does not".to_owned());
        }
        let swapped = self
            .swap
            .zip(self.swap_free)
            .map(|(all, free)| all.saturating_sub(free));
        if let Some(swapped) = swapped.filter(|&swapped| swapped > 1 << 30) {
            warn(format!(
                "{} are swapped out: memory is short; weights that are swapped come back slowly",
                bytes(swapped)
            ));
        }
        if let (Some(all), Some(available)) = (self.memory, self.available)
            && available < all / 2
        {
            warn(format!(
                "other programs hold {} of {} memory",
                bytes(all - available),
                bytes(all)
            ));
        }
        if let Some(lockable) = self.lockable.filter(|&lockable| lockable < 1 << 30) {
            warn(format!(
                "--mlock cannot work: a process may lock {} (`ulimit -l`)",
                bytes(lockable)
            ));
        }
        warnings
    }

    pub(super) fn cpu_line(&self) -> String {
        let name = self.cpu.as_deref().unwrap_or(std::env::consts::ARCH);
        format!("{name}, {} CPUs; {}", self.cpus, self.features.join(" "))
    }

    pub(super) fn cpu_json(&self) -> Json {
        json!({"name": self.cpu, "cpus": self.cpus, "features": self.features, "governor": self.governor})
    }

    pub(super) fn memory_line(&self) -> String {
        let size = |size: Option<u64>| size.map_or("?".to_owned(), bytes);
        let swap = match self.swap {
            Some(0) | None => String::new(),
            Some(swap) => format!(", {} swap", bytes(swap)),
        };
        format!(
            "{}, {} available{swap}",
            size(self.memory),
            size(self.available)
        )
    }

    pub(super) fn memory_json(&self, model: u64) -> Json {
        json!({
            "total_bytes": self.memory,
            "available_bytes": self.available,
            "model_bytes": model,
            "swap_bytes": self.swap,
            "lockable_bytes": self.lockable,
            "huge_pages": self.huge_pages,
        })
    }
}

fn cpu_name() -> Option<String> {
    let info = read("/proc/cpuinfo")?;
    let value = |key: &str| {
        let line = info.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    value("model name")
        .or_else(|| value("Model"))
        .or_else(|| value("Hardware"))
}

/// The instruction sets that kernels use or could use, of those that the CPU has.
fn features() -> Vec<&'static str> {
    let mut features = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! look {
            ($($feature:tt)*) => {$(
                if is_x86_feature_detected!($feature) {
                    features.push($feature);
                }
            )*};
        }
        look!("avx2" "fma" "f16c" "avxvnni" "avx512f" "avx512bw" "avx512vl" "avx512vnni" "avx512bf16");
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! look {
            ($($feature:tt)*) => {$(
                if std::arch::is_aarch64_feature_detected!($feature) {
                    features.push($feature);
                }
            )*};
        }
        look!("neon" "fp16" "dotprod" "i8mm" "bf16" "sve");
    }
    features
}

/// The choice in `always [madvise] never`.
fn chosen(text: &str) -> Option<&str> {
    Some(text.split_once('[')?.1.split_once(']')?.0)
}

/// Bytes that may be locked; `None` without a limit.
fn lockable() -> Option<u64> {
    let limits = read("/proc/self/limits")?;
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max locked memory"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

/// CPUs in `cpu.max`: microseconds of CPU time in a period of so many.
fn quota(text: &str) -> Option<f64> {
    let (time, period) = text.split_once(' ')?;
    Some(time.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
}

/// Whether the clock is the CPU's own affair, as with Intel's and AMD's newer drivers; their powersave is quick too.
fn has_own_governor() -> bool {
    let driver = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver");
    driver.is_some_and(|driver| driver.contains("pstate") || driver.contains("epp"))
}

fn on_battery() -> bool {
    let says =
        |supply: &Path, what: &str, value: &str| read(supply.join(what)).as_deref() == Some(value);
    entries("/sys/class/power_supply")
        .iter()
        .any(|supply| says(supply, "type", "Battery") && says(supply, "status", "Discharging"))
}

/// Graphics processors, by what drivers and the bus say of them.
fn gpus() -> Vec<String> {
    let mut gpus = Vec::new();
    for card in entries("/proc/driver/nvidia/gpus") {
        let about = read(card.join("information")).unwrap_or_default();
        let model = about.lines().find_map(|line| line.strip_prefix("Model:"));
        gpus.push(format!("NVIDIA {}", model.unwrap_or("GPU").trim()));
    }
    for card in entries("/sys/class/drm") {
        let name = card.file_name().unwrap_or_default().to_string_lossy();
        let is_card = name
            .strip_prefix("card")
            .is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
        let device = card.join("device");
        let vendor = read(device.join("vendor")).unwrap_or_default();
        let maker = match &*vendor {
            "0x1002" => "AMD",
            "0x8086" => "Intel",
            "0x10de" if gpus.is_empty() => "NVIDIA",
            _ => continue,
        };
        if !is_card {
            continue;
        }
        let id = read(device.join("device")).unwrap_or_default();
        let memory = read(device.join("mem_info_vram_total")).and_then(|text| text.parse().ok());
        let memory = memory.map_or(String::new(), |memory| format!(", {}", bytes(memory)));
        gpus.push(format!("{maker} {id}{memory}"));
    }
    gpus
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_linux_writes_is_read() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("nonsense"), None);
        assert_eq!(quota("150000 100000"), Some(1.5));
        assert_eq!(quota("max 100000"), None);
    }

    #[test]
    fn what_can_be_helped_is_said() {
        let quiet = Machine {
            cpus: 4,
            memory: Some(16 << 30),
            available: Some(12 << 30),
            swap: Some(8 << 30),
            swap_free: Some(8 << 30),
            load: Some(0.2),
            ..Machine::default()
        };
        assert!(quiet.warnings(4).is_empty());
        let busy = Machine {
            available: Some(4 << 30),
            swap_free: Some(2 << 30),
            load: Some(3.5),
            quota: Some(1.5),
            lockable: Some(8 << 20),
            on_battery: true,
            ..quiet
        };
        let warnings = busy.warnings(4);
        for word in [
            "quota",
            "load 3.5",
            "battery",
            "swapped",
            "12.88 GB of 17.18",
            "ulimit -l",
        ] {
            assert!(
                warnings.iter().any(|warning| warning.contains(word)),
                "{word}: {warnings:?}"
            );
        }
        assert_eq!(warnings.len(), 6);
    }
}
