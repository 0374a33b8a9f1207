//! What is refused, cut off, or made to wait.

use std::io::Write;
use std::time::{Duration, Instant};

use quant_tests::fixture;
use serde_json::{Value as Json, json};

use super::served::{Served, events, read, text_of, until_closed};
use super::{greedy, model};

#[test]
fn what_is_wrong_is_refused_in_one_line() {
    let model = model();
    let served = Served::start(&model.path, &["-c", "64", "--body-limit", "4000"]);
    let long = "word ".repeat(100);
    let user = |content: Json| json!([{"role": "user", "content": content}]);
    for (path, body, status, told) in [
        ("/v1/completions", "{\"prompt\"".to_owned(), 400, "no JSON"),
        ("/v1/completions", "[1]".into(), 400, "no JSON object"),
        ("/v1/completions", "{}".into(), 400, "prompt"),
        ("/v1/completions", "\u{0}\u{1}".into(), 400, "no JSON"),
        (
            "/v1/completions",
            json!({"prompt": []}).to_string(),
            400,
            "prompt",
        ),
        (
            "/v1/completions",
            json!({"prompt": [1, 99999999]}).to_string(),
            400,
            "vocabulary",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "n": 0}).to_string(),
            400,
            "n: must be within",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "n": 1000000}).to_string(),
            400,
            "n: must be within",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "max_tokens": -5}).to_string(),
            400,
            "max_tokens",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "temperature": -1}).to_string(),
            400,
            "temperature",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "samplers": ["none"]}).to_string(),
            400,
            "samplers",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "suffix": "b"}).to_string(),
            400,
            "suffix",
        ),
        (
            "/v1/completions",
            json!({"prompt": long}).to_string(),
            400,
            "leaves no room",
        ),
        (
            "/v1/completions",
            json!({"prompt": long.repeat(9)}).to_string(),
            413,
            "4000 bytes",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user(7.into())}).to_string(),
            400,
            "messages[0].content",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": "hi"}).to_string(),
            400,
            "messages",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "king", "content": "hi"}]}).to_string(),
            400,
            "king",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user("a".into()), "top_logprobs": 21}).to_string(),
            400,
            "top_logprobs",
        ),
        ("/v1/nothing", "{}".into(), 404, "/v1/nothing"),
    ] {
        let reply = served.send("POST", path, &[], &body);
        assert_eq!(reply.status, status, "{body}: {}", reply.body);
        let error = &reply.json()["error"];
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains(told) && !message.contains('\n'),
            "{body}: {message}"
        );
        assert!(error["type"].is_string());
    }
    assert_eq!(served.send("GET", "/v1/completions", &[], "").status, 405);
    // None of it has harmed anything.
    assert_eq!(
        served.post("/v1/completions", &greedy("The", 4)).status,
        200
    );
    assert_eq!(
        served.metric("fewbit_requests_total{result=\"server_error\"}"),
        0.0
    );
}

#[test]
fn a_full_queue_refuses_and_a_cut_connection_makes_room() {
    let model = model();
    let served = Served::start(
        &model.path,
        &["-c", "20000", "--slots", "1", "--queue", "1"],
    );
    let mut request = greedy("The history of", 100_000);
    // The fixture ends its texts by itself, unless it may not.
    request["logit_bias"] = json!({"2": false});
    request["stream"] = true.into();
    let first = served.open("POST", "/v1/completions", &request.to_string());
    served.until("fewbit_active", 1.0);
    let second = served.open("POST", "/v1/completions", &request.to_string());
    served.until("fewbit_waiting", 1.0);
    let third = served.post("/v1/completions", &request);
    assert_eq!(third.status, 429, "{}", third.body);
    assert!(third.head.contains("retry-after: 1"), "{}", third.head);
    // Both go away: the one in work, and the one in the queue.
    drop((first, second));
    served.until("fewbit_active", 0.0);
    served.until("fewbit_waiting", 0.0);
    assert!(served.metric("fewbit_cancelled_total") >= 1.0);
    assert_eq!(
        served.post("/v1/completions", &greedy("The", 4)).status,
        200
    );
}

#[test]
fn slow_clients_hold_nobody_up() {
    let model = model();
    let served = Served::start(&model.path, &["--slots", "1", "--patience", "1"]);
    // A client that reads nothing: its text is written all the same, and the slot is free.
    let mut request = greedy("The history of", 100);
    request["stream"] = true.into();
    let lazy = served.open("POST", "/v1/completions", &request.to_string());
    assert_eq!(
        served.post("/v1/completions", &greedy("The", 4)).status,
        200
    );
    let late = read(lazy);
    assert!(late.body.ends_with("data: [DONE]\n\n"), "{}", late.body);

    // A head, then a body, that does not come.
    let mut half = served.connect();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        .unwrap();
    let mut body = served.connect();
    body.write_all(
        b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    )
    .unwrap();
    let start = Instant::now();
    assert_eq!(read(body).status, 408);
    until_closed(half);
    assert!(start.elapsed() < Duration::from_secs(10));
    // A body that is cut off.
    let mut cut = served.connect();
    cut.write_all(
        b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    )
    .unwrap();
    cut.shutdown(std::net::Shutdown::Write).unwrap();
    until_closed(cut);
    assert_eq!(
        served.post("/v1/completions", &greedy("The", 4)).status,
        200
    );
}

#[test]
fn keys_names_and_origins() {
    let model = model();
    let open = Served::start(&model.path, &["--cors", "https://good.example"]);
    let status = |served: &Served, headers: &[(&str, &str)]| {
        served.send("GET", "/v1/models", headers, "").status
    };
    assert_eq!(status(&open, &[]), 200);
    // A page elsewhere whose name was made to point here, and one that sends requests here.
    assert_eq!(status(&open, &[("Host", "evil.example")]), 403);
    assert_eq!(status(&open, &[("Origin", "https://evil.example")]), 403);
    assert_eq!(status(&open, &[("Origin", "null")]), 403);
    let own = format!("http://localhost:{}", open.port);
    assert_eq!(
        status(
            &open,
            &[
                ("Origin", &own),
                ("Host", own.trim_start_matches("http://"))
            ]
        ),
        200
    );
    let good = open.send(
        "GET",
        "/v1/models",
        &[("Origin", "https://good.example")],
        "",
    );
    assert_eq!(good.status, 200);
    assert!(
        good.head
            .contains("access-control-allow-origin: https://good.example"),
        "{}",
        good.head
    );
    let asks = [
        ("Origin", "https://good.example"),
        ("Access-Control-Request-Method", "POST"),
        (
            "Access-Control-Request-Headers",
            "authorization,content-type",
        ),
    ];
    let preflight = open.send("OPTIONS", "/v1/chat/completions", &asks, "");
    assert_eq!(preflight.status, 200);
    assert!(
        preflight
            .head
            .contains("access-control-allow-headers: authorization,content-type")
    );

    let closed = Served::start(&model.path, &["--api-key", "secret"]);
    assert_eq!(status(&closed, &[]), 401);
    assert_eq!(status(&closed, &[("Authorization", "Bearer secre")]), 401);
    assert_eq!(status(&closed, &[("Authorization", "Bearer secret")]), 200);
    assert_eq!(
        status(
            &closed,
            &[
                ("Authorization", "Bearer secret"),
                ("Origin", "https://evil.example")
            ]
        ),
        403
    );
    assert_eq!(closed.send("GET", "/health", &[], "").status, 200);
    let plain = closed.send("GET", "/v1/models", &[("Origin", &own)], "");
    assert!(
        !plain.head.contains("access-control"),
        "CORS is off: {}",
        plain.head
    );
}

#[cfg(unix)]
#[test]
fn a_signal_lets_requests_finish() {
    let model = model();
    let mut served = Served::start(&model.path, &["-c", "8000"]);
    let mut request = greedy("The history of", 3000);
    request["logit_bias"] = json!({"2": false});
    let alone = text_of(&served.post("/v1/completions", &request).json());
    request["stream"] = true.into();
    let stream = served.open("POST", "/v1/completions", &request.to_string());
    served.until("fewbit_active", 1.0);
    served.signal("TERM");
    let reply = read(stream);
    let text: String = events(&reply.body).iter().map(text_of).collect();
    assert_eq!(text, alone);
    let (code, told) = served.wait();
    assert_eq!(
        (code, told.trim()),
        (Some(0), "fewbit: ended; all requests were finished")
    );
}

#[cfg(unix)]
#[test]
fn two_signals_or_a_grace_that_is_over_cut_requests_off() {
    let model = model();
    let mut request = greedy("The history of", 100_000);
    request["logit_bias"] = json!({"2": false});
    request["stream"] = true.into();
    for (arguments, signals) in [
        (&["-c", "20000", "--grace", "0"][..], 1),
        (&["-c", "20000"][..], 2),
    ] {
        let mut served = Served::start(&model.path, arguments);
        let stream = served.open("POST", "/v1/completions", &request.to_string());
        served.until("fewbit_active", 1.0);
        for _ in 0..signals {
            served.signal("INT");
            std::thread::sleep(Duration::from_millis(100));
        }
        let (code, told) = served.wait();
        assert_eq!(
            (code, told.trim()),
            (Some(0), "fewbit: ended; some requests were cut off")
        );
        assert!(!read(stream).body.ends_with("data: [DONE]\n\n"));
    }
}

#[test]
fn an_address_in_use_is_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = std::process::Command::new(fixture::binary())
        .args(["serve", "-m", "none.gguf", "--port", &port])
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        told.contains(&port) && told.contains("--port") && told.lines().count() == 1,
        "{told}"
    );
}
