//! Which CPUs there are: how many threads are worth starting, and where to keep them.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::thread;

/// Numbers beyond this are no CPUs: as far as Linux's own sets go.
const MAX_CPU: usize = 1 << 10;

/// One thread a fast physical core that the process may use: two threads on one core share its
/// multipliers and its way to memory, which is all that kernels need, and the small cores of a
/// hybrid CPU would take memory bandwidth for little. No more than a quota (of a container,
/// say) lets run at once.
pub fn default_count() -> usize {
    let allowed = thread::available_parallelism().map_or(1, usize::from);
    let cores = allowed_cpus().and_then(|cpus| fast_cores(Path::new("/sys"), &cpus));
    cores.map_or(allowed, |cores| cores.clamp(1, allowed))
}

/// The CPUs that the process may run on, where Linux says.
fn allowed_cpus() -> Option<Vec<usize>> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    parse_list(list)
}

/// Physical cores among `cpus`, the small ones of a hybrid CPU left out, as the tree in `sys`
/// (Linux's `/sys`) describes them; `None` where it does not.
fn fast_cores(sys: &Path, cpus: &[usize]) -> Option<usize> {
    let read = |path: String| fs::read_to_string(sys.join("devices").join(path)).ok();
    let cpu_says = |cpu: usize, what: &str| read(format!("system/cpu/cpu{cpu}/{what}"));
    let number = |cpu: usize, what: &str| cpu_says(cpu, what)?.trim().parse::<u64>().ok();
    // Those that are at least so many quarters of the best one.
    let near_the_best = |what: &str, quarters: u64| -> Option<Vec<usize>> {
        let values: Option<Vec<_>> = cpus.iter().map(|&cpu| number(cpu, what)).collect();
        let values = values?;
        let best = *values.iter().max()?;
        let pairs = cpus.iter().zip(values);
        let near = pairs.filter(|(_, value)| value * 4 >= best * quarters);
        Some(near.map(|(&cpu, _)| cpu).collect())
    };
    let intel = || {
        let list = parse_list(&read("cpu_core/cpus".into())?)?;
        let fast = cpus.iter().copied().filter(|cpu| list.contains(cpu));
        // Kept to its small cores, a process has no others.
        Some(fast.collect::<Vec<_>>()).filter(|fast| !fast.is_empty())
    };
    // `cpu_capacity` is a core's throughput relative to the largest: a middle core of a phone has
    // about three quarters, a little one less than half. Clock rates alone say less, since
    // small cores also do less a cycle: dense AMD cores have two thirds of the others'.
    let fast = intel()
        .or_else(|| near_the_best("cpu_capacity", 2))
        .or_else(|| near_the_best("cpufreq/cpuinfo_max_freq", 3))
        .unwrap_or_else(|| cpus.to_vec());
    let siblings = |cpu| cpu_says(cpu, "topology/thread_siblings_list");
    let cores: Option<BTreeSet<_>> = fast.into_iter().map(siblings).collect();
    cores.map(|cores| cores.len())
}

/// Some CPUs by number, at least one, ascending.
///
/// Read from a list such as `0-3,8` or a mask in hexadecimal such as `0xff`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuSet(Vec<usize>);

impl CpuSet {
    /// Their numbers.
    pub fn cpus(&self) -> &[usize] {
        &self.0
    }
}

impl FromStr for CpuSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cpus = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
            Some(mask) => parse_mask(mask),
            None => parse_list(text),
        };
        match cpus {
            Some(cpus) if !cpus.is_empty() => Ok(Self(cpus)),
            _ => Err("must be a list of CPUs such as 0-3,8 or a mask such as 0xff".into()),
        }
    }
}

/// The CPUs of a list such as `0-3,8`, ascending.
fn parse_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = BTreeSet::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if first > last || last >= MAX_CPU {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus.into_iter().collect())
}

/// The CPUs whose bits are set in hexadecimal digits, the lowest four in the last one.
fn parse_mask(digits: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for (place, digit) in digits.chars().rev().enumerate() {
        let bits = digit.to_digit(16)?;
        cpus.extend(
            (0..4)
                .filter(|bit| bits >> bit & 1 == 1)
                .map(|bit| place * 4 + bit),
        );
    }
    cpus.last()
        .is_none_or(|&last| last < MAX_CPU)
        .then_some(cpus)
}

/// Keeps the calling thread, and those that it starts from then on, on one CPU.
///
/// # Errors
/// The system's, where the process may not use that CPU; always, where the system is not Linux.
pub(super) fn pin(cpu: usize) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu.min(MAX_CPU - 1));
        rustix::thread::sched_setaffinity(None, &set).map_err(Into::into)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let problem = format!("CPU {cpu}: threads are kept on CPUs on Linux only");
        Err(io::Error::new(io::ErrorKind::Unsupported, problem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A made-up `/sys`: for each CPU its siblings and, by file name, a figure.
    fn tree(files: &[(String, String)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join("devices").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{content}\n")).unwrap();
        }
        dir
    }

    /// CPUs that stand alone on their cores, but for the first `twins` pairs.
    fn siblings(cpus: usize, twins: usize) -> Vec<(String, String)> {
        let list = |cpu: usize| match cpu < 2 * twins {
            true => format!("{}-{}", cpu / 2 * 2, cpu / 2 * 2 + 1),
            false => cpu.to_string(),
        };
        let path = |cpu| format!("system/cpu/cpu{cpu}/topology/thread_siblings_list");
        (0..cpus).map(|cpu| (path(cpu), list(cpu))).collect()
    }

    fn figures<T: ToString>(what: &str, figures: &[T]) -> Vec<(String, String)> {
        let path = |cpu| format!("system/cpu/cpu{cpu}/{what}");
        let figures = figures.iter().enumerate();
        figures
            .map(|(cpu, figure)| (path(cpu), figure.to_string()))
            .collect()
    }

    fn all(cpus: usize) -> Vec<usize> {
        (0..cpus).collect()
    }

    #[test]
    fn two_threads_of_a_core_count_once() {
        let sys = tree(&siblings(8, 4));
        assert_eq!(fast_cores(sys.path(), &all(8)), Some(4));
        assert_eq!(fast_cores(sys.path(), &[0, 1, 5]), Some(2));
    }

    #[test]
    fn of_an_intel_hybrid_the_performance_cores_count() {
        // Two cores of two threads, four small ones, which clock nearly as high.
        let mut files = siblings(8, 2);
        files.push(("cpu_core/cpus".into(), "0-3".into()));
        files.push(("cpu_atom/cpus".into(), "4-7".into()));
        files.extend(figures(
            "cpufreq/cpuinfo_max_freq",
            &[52, 52, 52, 52, 40, 40, 40, 40],
        ));
        let sys = tree(&files);
        assert_eq!(fast_cores(sys.path(), &all(8)), Some(2));
        assert_eq!(fast_cores(sys.path(), &[2, 3, 4, 5]), Some(1));
        let small = fast_cores(sys.path(), &[4, 5, 6]);
        assert_eq!(small, Some(3), "kept to its small cores");
    }

    #[test]
    fn of_an_arm_hybrid_the_little_cores_do_not_count() {
        let mut files = siblings(8, 0);
        files.extend(figures(
            "cpu_capacity",
            &[325, 325, 325, 780, 780, 780, 780, 1024],
        ));
        files.extend(figures("cpufreq/cpuinfo_max_freq", &[20; 8]));
        let sys = tree(&files);
        assert_eq!(fast_cores(sys.path(), &all(8)), Some(5));
        assert_eq!(fast_cores(sys.path(), &[0, 1, 2]), Some(3));
    }

    #[test]
    fn of_cores_that_differ_in_clock_the_fast_ones_count() {
        // A dense core has two thirds of the clock; a favoured one a little more than others.
        let mut files = siblings(8, 4);
        files.extend(figures(
            "cpufreq/cpuinfo_max_freq",
            &[5100, 5100, 5000, 5000, 3300, 3300, 3300, 3300],
        ));
        let sys = tree(&files);
        assert_eq!(fast_cores(sys.path(), &all(8)), Some(2));
    }

    #[test]
    fn a_system_that_says_nothing_is_not_guessed_at() {
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(fast_cores(empty.path(), &all(4)), None);
        // Figures for some CPUs alone are no figures.
        let mut files = siblings(4, 0);
        files.extend(figures("cpu_capacity", &[1024, 300]));
        assert_eq!(fast_cores(tree(&files).path(), &all(4)), Some(4));
        assert!(default_count() >= 1);
    }

    #[test]
    fn sets_of_cpus_are_lists_or_masks() {
        let cpus = |text: &str| text.parse().map(|CpuSet(cpus)| cpus).ok();
        assert_eq!(cpus("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(cpus("5,0-1,1"), Some(vec![0, 1, 5]));
        assert_eq!(cpus("10"), Some(vec![10]));
        assert_eq!(cpus("0x10"), Some(vec![4]));
        assert_eq!(cpus("0XA5"), Some(vec![0, 2, 5, 7]));
        assert_eq!(
            cpus("0x10000000000000001"),
            Some(vec![0, 64]),
            "wider than a word"
        );
        for wrong in [
            "",
            "x",
            "3-1",
            "1,",
            "0x",
            "0x0",
            "0xg",
            "1024",
            "0-99999999999",
        ] {
            assert_eq!(cpus(wrong), None, "{wrong:?}");
        }
        assert_eq!(cpus(&format!("0x1{}", "0".repeat(256))), None);
    }
}
