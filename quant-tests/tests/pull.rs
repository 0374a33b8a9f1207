//! Downloads, against a hub and a mirror on this machine: what is cut off goes on, what is wrong is refused, the token
//! stays at home. And the names of what was pulled.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use fewbit::pull::{Error, Options, Pulled, Retry, Watch, pull};
use quant_tests::fixture::{self, binary};
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// A request, as the server saw it.
#[derive(Clone, Debug)]
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What it answers.
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Bytes of the body after which the connection is cut.
    cut: Option<usize>,
}

fn answer(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    Answer {
        status,
        headers: Vec::new(),
        body: body.into(),
        cut: None,
    }
}

impl Answer {
    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    fn cut(mut self, after: usize) -> Self {
        self.cut = Some(after);
        self
    }
}

/// A server on a port of its own. Its thread ends with the process.
struct Server {
    url: String,
    port: u16,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start(respond: impl Fn(&Request) -> Answer + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                if let Some(request) = read(&stream) {
                    log.lock().unwrap().push(request.clone());
                    write(stream, respond(&request));
                }
            }
        });
        Self {
            url: format!("http://127.0.0.1:{port}"),
            port,
            seen,
        }
    }

    fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let path = first.split(' ').nth(1)?.to_owned();
    let mut headers = HashMap::new();
    for line in lines {
        let line = line.ok()?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    Some(Request { path, headers })
}

fn write(mut stream: TcpStream, answer: Answer) {
    let mut head = format!(
        "HTTP/1.1 {} X\r\nContent-Length: {}\r\nConnection: close\r\n",
        answer.status,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let end = answer.cut.unwrap_or(answer.body.len());
    // The client may have seen enough.
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&answer.body[..end]);
}

/// `body` from where the request asks for it, as a server that knows ranges sends it.
fn ranged(request: &Request, body: &[u8], etag: &str) -> Answer {
    let start = request.header("range").map(|range| {
        let start = range.strip_prefix("bytes=").unwrap().strip_suffix('-');
        start.unwrap().parse::<usize>().unwrap()
    });
    let same = request.header("if-range").is_none_or(|tag| tag == etag);
    match start.filter(|_| same) {
        Some(start) if start >= body.len() => answer(416, ""),
        Some(start) => answer(206, &body[start..]).with(
            "Content-Range",
            format!("bytes {start}-{}/{}", body.len() - 1, body.len()),
        ),
        None => answer(200, body),
    }
    .with("ETag", etag)
}

/// Hears nothing.
struct Quiet;

impl Watch for Quiet {
    fn begin(&self, _: &str, _: Option<u64>, _: u64) {}
    fn advance(&self, _: u64) {}
    fn retry(&self, _: &Error, _: Duration) {}
}

fn options(folder: &TempDir, endpoint: &str) -> Options {
    Options {
        folder: folder.path().to_owned(),
        endpoint: endpoint.to_owned(),
        token: None,
        sha256: None,
        checkpoint: false,
        retry: Retry {
            attempts: 3,
            wait: Duration::from_millis(5),
        },
    }
}

fn get(source: &str, options: &Options) -> Result<Pulled, Error> {
    pull(&source.parse().unwrap(), options, &Quiet)
}

#[track_caller]
fn refused(source: &str, options: &Options) -> String {
    let line = get(source, options).unwrap_err().to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

/// Bytes that differ everywhere.
fn weights(len: usize) -> Vec<u8> {
    (0..len as u32)
        .flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 8).to_le_bytes())
        .take(len)
        .collect()
}

fn sha256(bytes: &[u8]) -> String {
    let sum = Sha256::digest(bytes);
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An entry of a hub's listing.
fn listed(path: &str, bytes: &[u8]) -> Json {
    json!({"type": "file", "path": path, "size": bytes.len(), "oid": "0",
        "lfs": {"oid": sha256(bytes), "size": bytes.len(), "pointerSize": 134}})
}

/// What lies in a folder and below, without the folder's own name.
fn files_in(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => found.push(
                    path.strip_prefix(folder)
                        .unwrap()
                        .to_string_lossy()
                        .into_owned(),
                ),
            }
        }
    }
    found.sort();
    found
}

const TREE: &str = "/api/models/org/repo-GGUF/tree/main?recursive=true";

#[test]
fn a_download_that_is_cut_off_goes_on_where_it_stopped() {
    let body = weights(300_000);
    let tries = Arc::new(Mutex::new(0));
    let (served, count) = (body.clone(), Arc::clone(&tries));
    let server = Server::start(move |request| {
        let mut tries = count.lock().unwrap();
        *tries += 1;
        let answer = ranged(request, &served, "\"v1\"");
        match *tries {
            1..=3 => answer.cut(70_000),
            4 => crate::answer(503, "busy"),
            _ => answer,
        }
    });
    let folder = TempDir::new().unwrap();
    let pulled = get(
        &format!("{}/m.gguf", server.url),
        &options(&folder, &server.url),
    )
    .unwrap();
    assert_eq!(fs::read(&pulled.files[0]).unwrap(), body);
    assert_eq!((pulled.bytes, pulled.downloaded), (300_000, 300_000));
    assert_eq!(files_in(folder.path()), ["m.gguf"]);
    let seen = server.seen();
    let ranges: Vec<_> = seen.iter().map(|request| request.header("range")).collect();
    let wanted = [
        "bytes=70000-",
        "bytes=140000-",
        "bytes=210000-",
        "bytes=210000-",
    ];
    assert_eq!(ranges[0], None);
    assert_eq!(ranges[1..], wanted.map(Some));
    assert!(
        seen[1..]
            .iter()
            .all(|request| request.header("if-range") == Some("\"v1\""))
    );
}

#[test]
fn another_run_goes_on_too_unless_the_file_has_changed() {
    let body = weights(200_000);
    let other = weights(150_000);
    let state = Arc::new(Mutex::new("cut"));
    let (served, changed, now) = (body.clone(), other.clone(), Arc::clone(&state));
    let server = Server::start(move |request| match *now.lock().unwrap() {
        "cut" => match request.header("range") {
            None => ranged(request, &served, "\"v1\"").cut(90_000),
            Some(_) => answer(404, ""),
        },
        "whole" => ranged(request, &served, "\"v1\""),
        _ => ranged(request, &changed, "\"v2\""),
    });
    let url = format!("{}/m.gguf", server.url);
    for (then, whole) in [("whole", &body), ("changed", &other)] {
        *state.lock().unwrap() = "cut";
        let folder = TempDir::new().unwrap();
        let options = options(&folder, &server.url);
        let line = refused(&url, &options);
        assert!(line.contains("404"), "{line}");
        assert_eq!(files_in(folder.path()), ["m.gguf.part", "m.gguf.part.etag"]);
        *state.lock().unwrap() = then;
        let pulled = get(&url, &options).unwrap();
        assert_eq!(&fs::read(&pulled.files[0]).unwrap(), whole, "{then}");
        let downloaded = match then {
            "whole" => 110_000,
            _ => 150_000,
        };
        assert_eq!(pulled.downloaded, downloaded, "{then}");
        assert_eq!(files_in(folder.path()), ["m.gguf"]);
        // And nothing is fetched twice.
        assert_eq!(get(&url, &options).unwrap().downloaded, 0);
    }
}

#[test]
fn a_server_that_keeps_failing_is_given_up_and_what_came_is_kept() {
    let body = weights(100_000);
    let server = Server::start(move |request| match request.header("range") {
        None => ranged(request, &body, "\"v1\"").cut(40_000),
        Some(_) => answer(502, ""),
    });
    let folder = TempDir::new().unwrap();
    let line = refused(
        &format!("{}/m.gguf", server.url),
        &options(&folder, &server.url),
    );
    assert!(line.contains("502"), "{line}");
    // The first, and three more.
    assert_eq!(server.seen().len(), 4);
    let part = fs::metadata(folder.path().join("m.gguf.part")).unwrap();
    assert_eq!(part.len(), 40_000);
}

#[test]
fn a_wrong_hash_leaves_nothing() {
    let body = weights(50_000);
    let server = Server::start(move |request| match &*request.path {
        TREE => {
            let mut file = listed("x-Q4_0.gguf", &body);
            file["lfs"]["oid"] = json!("0".repeat(64));
            answer(200, json!([file]).to_string())
        }
        _ => ranged(request, &body, "\"v1\""),
    });
    let folder = TempDir::new().unwrap();
    let options = options(&folder, &server.url);
    let line = refused("hf:org/repo-GGUF:Q4_0", &options);
    assert!(line.contains("SHA-256"), "{line}");
    assert!(files_in(folder.path()).is_empty());
    let of_url = |sum: &str| Options {
        sha256: Some(sum.to_owned()),
        ..options.clone()
    };
    let url = format!("{}/y.gguf", server.url);
    let line = refused(&url, &of_url(&"1".repeat(64)));
    assert!(line.contains("SHA-256"), "{line}");
    assert!(files_in(folder.path()).is_empty());
    let line = refused(&url, &of_url("12"));
    assert!(line.contains("64 hexadecimal"), "{line}");
    let right = sha256(&weights(50_000)).to_uppercase();
    let pulled = get(&url, &of_url(&right)).unwrap();
    assert_eq!(pulled.sha256, [Some(right.to_lowercase())]);
}

#[test]
fn the_token_stays_at_its_host() {
    let body = weights(1000);
    let served = body.clone();
    let cdn = Server::start(move |request| ranged(request, &served, "\"v1\""));
    let (listing, elsewhere) = (body.clone(), format!("http://localhost:{}", cdn.port));
    let hub = Server::start(move |request| {
        if request.header("authorization") != Some("Bearer secret") {
            return answer(401, "");
        }
        match &*request.path {
            TREE => answer(200, json!([listed("x-Q4_0.gguf", &listing)]).to_string()),
            "/org/repo-GGUF/resolve/main/x-Q4_0.gguf" => {
                answer(307, "").with("Location", "/org/renamed/x-Q4_0.gguf")
            }
            _ => answer(302, "").with("Location", format!("{elsewhere}/x?signature=1")),
        }
    });
    let folder = TempDir::new().unwrap();
    let mut options = options(&folder, &hub.url);
    let line = refused("hf:org/repo-GGUF:Q4_0", &options);
    assert!(
        line.contains("401") && line.contains("set HF_TOKEN"),
        "{line}"
    );
    options.token = Some("secret".to_owned());
    let pulled = get("hf:org/repo-GGUF:Q4_0", &options).unwrap();
    assert_eq!(fs::read(&pulled.files[0]).unwrap(), body);
    assert_eq!(files_in(folder.path()), ["org/repo-GGUF/x-Q4_0.gguf"]);
    let seen = cdn.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].header("authorization"), None, "{seen:?}");
    assert_eq!(seen[0].path, "/x?signature=1");
}

#[test]
fn splits_come_all_and_the_listing_page_by_page() {
    let parts = [weights(3000), weights(2000)];
    let name = |number: usize| format!("Q8_0/x y-Q8_0-{number:05}-of-00002.gguf");
    let served = parts.clone();
    let server = Server::start(move |request| {
        let next = format!("<{}&cursor=2>; rel=\"next\"", TREE);
        let host = request.header("host").unwrap();
        match &*request.path {
            TREE => answer(200, json!([listed(&name(2), &served[1]), {"type": "directory", "path": "Q8_0", "size": 0, "oid": "0"}]).to_string())
                .with("Link", next.replace('<', &format!("<http://{host}"))),
            path if path.ends_with("cursor=2") => {
                answer(200, json!([listed(&name(1), &served[0]), listed("x-Q4_0.gguf", b"4")]).to_string())
            }
            "/org/repo-GGUF/resolve/main/Q8_0/x%20y-Q8_0-00001-of-00002.gguf" => ranged(request, &served[0], "\"1\""),
            "/org/repo-GGUF/resolve/main/Q8_0/x%20y-Q8_0-00002-of-00002.gguf" => ranged(request, &served[1], "\"2\""),
            _ => answer(404, ""),
        }
    });
    let folder = TempDir::new().unwrap();
    let options = options(&folder, &server.url);
    let pulled = get("hf:org/repo-GGUF:q8_0", &options).unwrap();
    let contents = pulled.files.iter().map(|file| fs::read(file).unwrap());
    assert_eq!(contents.collect::<Vec<_>>(), parts);
    assert_eq!(pulled.bytes, 5000);
    let again = get("hf:org/repo-GGUF:q8_0", &options).unwrap();
    assert_eq!((again.bytes, again.downloaded), (5000, 0));
    let line = refused("hf:org/repo-GGUF:Q6_K", &options);
    assert!(
        line.contains("has no Q6_K; there are Q8_0 (0.00 GB), Q4_0"),
        "{line}"
    );
    let line = refused("hf:org/other:Q6_K", &options);
    assert!(
        line.contains("404") && line.contains("check the name"),
        "{line}"
    );
}

#[test]
fn a_listing_that_leads_elsewhere_is_refused() {
    let server =
        Server::start(|_| answer(200, json!([listed("../../x-Q4_0.gguf", b"4")]).to_string()));
    let folder = TempDir::new().unwrap();
    let line = refused("hf:org/repo-GGUF:Q4_0", &options(&folder, &server.url));
    assert!(line.contains("which is no path"), "{line}");
    let server = Server::start(|_| answer(200, "<html>"));
    let line = refused("hf:org/repo-GGUF:Q4_0", &options(&folder, &server.url));
    assert!(line.contains("no list of files"), "{line}");
    let server = Server::start(|request| answer(302, "").with("Location", &request.path));
    let line = refused("hf:org/repo-GGUF:Q4_0", &options(&folder, &server.url));
    assert!(line.contains("redirects in a row"), "{line}");
}

#[test]
fn more_than_the_disk_holds_is_refused_before_anything_comes() {
    let server = Server::start(|_| {
        let mut file = listed("x-Q4_0.gguf", b"4");
        file["lfs"]["size"] = json!(1u64 << 60);
        answer(200, json!([file]).to_string())
    });
    let folder = TempDir::new().unwrap();
    let line = refused("hf:org/repo-GGUF:Q4_0", &options(&folder, &server.url));
    assert!(line.contains("are needed"), "{line}");
    assert_eq!(server.seen().len(), 1);
}

#[test]
fn a_checkpoint_comes_with_what_belongs_to_it() {
    let files: [(&str, &[u8]); 6] = [
        ("config.json", b"{}"),
        ("model-00001-of-00001.safetensors", b"weights"),
        ("consolidated.safetensors", b"the same"),
        ("tokenizer.model", b"pieces"),
        ("README.md", b"text"),
        ("onnx/model.safetensors", b"other"),
    ];
    let server = Server::start(move |request| {
        let path = request.path.strip_prefix("/org/base/resolve/main/");
        let found = files.iter().find(|(name, _)| Some(*name) == path);
        match (found, &*request.path) {
            (Some((_, body)), _) => ranged(request, body, "\"1\""),
            (None, "/api/models/org/base/tree/main?recursive=true") => answer(
                200,
                Json::from_iter(files.map(|(name, body)| listed(name, body))).to_string(),
            ),
            _ => answer(404, ""),
        }
    });
    let folder = TempDir::new().unwrap();
    let mut options = options(&folder, &server.url);
    let line = refused("hf:org/base", &options);
    assert!(
        line.contains("fewbit pull --checkpoint hf:org/base"),
        "{line}"
    );
    options.checkpoint = true;
    let pulled = get("hf:org/base", &options).unwrap();
    assert_eq!(pulled.checkpoint, Some(folder.path().join("org/base")));
    let names = [
        "org/base/config.json",
        "org/base/model-00001-of-00001.safetensors",
        "org/base/tokenizer.model",
    ];
    assert_eq!(files_in(folder.path()), names);
}

fn fewbit(home: &Path, endpoint: &str, arguments: &[&str]) -> Output {
    Command::new(binary())
        .args(arguments)
        .env("FEWBIT_HOME", home)
        .env("HF_ENDPOINT", endpoint)
        .env_remove("HF_TOKEN")
        .output()
        .unwrap()
}

#[track_caller]
fn done(output: Output) -> String {
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_pulled_model_is_listed_run_by_its_name_and_removed() {
    let model = fixture::tiny_mixtral("Q4_K_M");
    let body = fs::read(&model.path).unwrap();
    let hub = Server::start(move |request| match &*request.path {
        TREE => answer(200, json!([listed("Tiny-Q4_K_M.gguf", &body)]).to_string()),
        "/org/repo-GGUF/resolve/main/Tiny-Q4_K_M.gguf" => ranged(request, &body, "\"1\""),
        _ => answer(404, ""),
    });
    let home = TempDir::new().unwrap();
    let fewbit = |arguments: &[&str]| fewbit(home.path(), &hub.url, arguments);
    let pulled: Json = serde_json::from_str(&done(fewbit(&[
        "pull",
        "--json",
        "hf:org/repo-GGUF:Q4_K_M",
    ])))
    .unwrap();
    assert_eq!(pulled["name"], "Tiny-Q4_K_M");
    let path = home.path().join("models/org/repo-GGUF/Tiny-Q4_K_M.gguf");
    assert_eq!(pulled["path"], path.to_str().unwrap());
    let list: Json = serde_json::from_str(&done(fewbit(&["list", "--json"]))).unwrap();
    assert_eq!(list["models"][0]["name"], "Tiny-Q4_K_M");
    assert_eq!(list["models"][0]["type"], "Q4_K_M");
    assert!(done(fewbit(&["list"])).contains("Tiny-Q4_K_M  Q4_K_M"));

    let run = |name: &str| fewbit(&["run", "-m", name, "-n", "4", "--temp", "0", "The"]);
    let by_path = done(run(path.to_str().unwrap()));
    for name in [
        "Tiny-Q4_K_M",
        "tiny-q4_k_m",
        "hf:org/repo-GGUF:Q4_K_M",
        "repo-GGUF/Tiny-Q4_K_M",
    ] {
        assert_eq!(done(run(name)), by_path, "{name}");
    }
    done(fewbit(&["inspect", "Tiny-Q4_K_M"]));
    let wrong = run("Tiny-Q5_K_M");
    assert_eq!(wrong.status.code(), Some(1));
    let line = String::from_utf8(wrong.stderr).unwrap();
    assert!(
        line.contains("near it: Tiny-Q4_K_M") && line.lines().count() == 1,
        "{line}"
    );
    let line = String::from_utf8(run("./Tiny-Q4_K_M.gguf").stderr).unwrap();
    assert!(line.contains("cannot open the file"), "{line}");

    done(fewbit(&["rm", "Tiny-Q4_K_M"]));
    assert!(files_in(home.path()).is_empty());
    assert!(!home.path().join("models/org").exists());
    assert_eq!(fewbit(&["rm", "Tiny-Q4_K_M"]).status.code(), Some(1));
    assert_eq!(fewbit(&["pull", "org/repo"]).status.code(), Some(2));
}
