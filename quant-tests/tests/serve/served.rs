//! A server in a process of its own, and a client that is no more than a socket.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use quant_tests::fixture::binary;
use serde_json::Value as Json;

/// A running `fewbit serve`; killed when dropped.
pub struct Served {
    child: Child,
    stderr: BufReader<ChildStderr>,
    pub port: u16,
}

/// An answer.
pub struct Reply {
    pub status: u16,
    /// The headers, names in lower case.
    pub head: String,
    pub body: String,
}

impl Reply {
    #[track_caller]
    pub fn json(&self) -> Json {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Served {
    /// Starts a server on any free port and waits until it listens.
    pub fn start(model: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(binary())
            .args(["serve", "--port", "0", "-m"])
            .arg(model)
            .args(arguments)
            .env_remove("FEWBIT_API_KEY")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert!(stderr.read_line(&mut line).unwrap() > 0, "the server ended");
        }
        let port = line.trim().rsplit(':').next().unwrap().parse().unwrap();
        Self {
            child,
            stderr,
            port,
        }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        stream
    }

    /// Sends a request of HTTP 1.0, so that the answer ends with the connection, and returns what can be read from.
    pub fn open(&self, method: &str, path: &str, body: &str) -> TcpStream {
        self.request(method, path, &[], body)
    }

    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
        let mut head = format!(
            "{method} {path} HTTP/1.0\r\nContent-Length: {}\r\n",
            body.len()
        );
        if !headers.iter().any(|(name, _)| *name == "Host") {
            head += "Host: localhost\r\n";
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        let mut stream = self.connect();
        stream
            .write_all(format!("{head}\r\n{body}").as_bytes())
            .unwrap();
        stream
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        read(self.request(method, path, headers, body))
    }

    pub fn post(&self, path: &str, body: &Json) -> Reply {
        self.send("POST", path, &[], &body.to_string())
    }

    /// A figure of `/metrics`.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.send("GET", "/metrics", &[], "").body;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .parse()
            .unwrap()
    }

    /// Waits until a figure is `value`.
    #[track_caller]
    pub fn until(&self, name: &str, value: f64) {
        let start = Instant::now();
        while self.metric(name) != value {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{name} never became {value}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[cfg(unix)]
    pub fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        let sent = Command::new("sh").args(["-c", &kill]).status();
        assert!(sent.unwrap().success());
    }

    /// Waits for the end; the exit code, and what was told last.
    #[cfg(unix)]
    pub fn wait(&mut self) -> (Option<i32>, String) {
        let mut told = String::new();
        self.stderr.read_to_string(&mut told).unwrap();
        (self.child.wait().unwrap().code(), told)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads an answer to its end.
pub fn read(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    // A server that refuses a body without reading it may reset the connection after the answer.
    match stream.read_to_end(&mut bytes) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
        _ => {}
    }
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Reply {
        status: status.unwrap_or(0),
        head: head.to_ascii_lowercase(),
        body: body.to_owned(),
    }
}

/// Waits until the server closes a connection.
pub fn until_closed(mut stream: TcpStream) {
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
}

/// The chunks of a stream.
pub fn events(body: &str) -> Vec<Json> {
    let data = body.lines().filter_map(|line| line.strip_prefix("data: "));
    let chunks = data.filter(|data| *data != "[DONE]");
    chunks
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

/// The text of a completion or of a chunk of one.
#[track_caller]
pub fn text_of(reply: &Json) -> String {
    let text = reply["choices"][0]["text"].as_str();
    text.unwrap_or_else(|| panic!("no text in {reply}"))
        .to_owned()
}
