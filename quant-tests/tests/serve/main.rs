//! `fewbit serve` as its clients see it, on the trained fixture.

mod served;

use std::io::Write;
use std::time::{Duration, Instant};

use quant_tests::fixture::{self, ModelFile};
use serde_json::{Value as Json, json};

use served::{Served, events, text_of};

fn model() -> ModelFile {
    fixture::tiny_mixtral("Q8_0")
}

/// A greedy completion.
fn greedy(prompt: &str, tokens: usize) -> Json {
    json!({"prompt": prompt, "temperature": 0, "max_tokens": tokens})
}

const PROMPTS: [&str; 8] = [
    "The history of",
    "Der Fluss",
    "La ville de",
    "El rey",
    "The city is one of the",
    "In the year",
    "Una delle",
    "Le premier",
];

#[test]
fn a_completion_is_what_run_writes() {
    let model = model();
    let served = Served::start(&model.path, &[]);
    let whole = served.post("/v1/completions", &greedy("The history of", 24));
    let run = std::process::Command::new(served::binary())
        .args(["run", "--temp", "0", "-n", "24", "-m"])
        .args([model.path.as_os_str(), "The history of".as_ref()])
        .output()
        .unwrap();
    let run = String::from_utf8(run.stdout).unwrap();
    assert_eq!(text_of(&whole.json()), run.strip_suffix('\n').unwrap());
    let usage = &whole.json()["usage"];
    assert_eq!(usage["completion_tokens"], 24);
    assert_eq!(whole.json()["choices"][0]["finish_reason"], "length");
}

#[test]
fn texts_written_together_are_those_written_alone() {
    let model = model();
    let served = Served::start(&model.path, &["--slots", "5"]);
    let alone: Vec<String> = PROMPTS
        .iter()
        .map(|prompt| text_of(&served.post("/v1/completions", &greedy(prompt, 40)).json()))
        .collect();
    // More at a time than there are slots, several times over, half of them as streams.
    std::thread::scope(|scope| {
        for client in 0..24 {
            let (served, alone) = (&served, &alone);
            scope.spawn(move || {
                let (prompt, alone) = (PROMPTS[client % 8], &alone[client % 8]);
                let mut request = greedy(prompt, 40);
                if client % 2 == 0 {
                    let text = text_of(&served.post("/v1/completions", &request).json());
                    assert_eq!(&text, alone);
                } else {
                    request["stream"] = true.into();
                    let reply = served.post("/v1/completions", &request);
                    let text: String = events(&reply.body).iter().map(text_of).collect();
                    assert_eq!(&text, alone);
                }
            });
        }
    });
    assert_eq!(served.metric("fewbit_active"), 0.0);
    assert_eq!(served.metric("fewbit_waiting"), 0.0);
    assert!(served.metric("fewbit_cached_tokens_total") > 0.0);
}

#[test]
fn a_conversation_goes_on_with_what_was_read_and_no_other_bits() {
    let model = model();
    let chat = |served: &Served, messages: &Json| {
        let request = json!({"messages": messages, "temperature": 0, "max_tokens": 12});
        served.post("/v1/chat/completions", &request).json()
    };
    let content = |reply: &Json| reply["choices"][0]["message"]["content"].clone();
    let served = Served::start(&model.path, &[]);
    let mut messages =
        json!([{"role": "user", "content": "The history of the river and the city"}]);
    let first = chat(&served, &messages);
    let turns = messages.as_array_mut().unwrap();
    turns.push(json!({"role": "assistant", "content": content(&first)}));
    turns.push(json!({"role": "user", "content": "Who was the king?"}));
    let second = chat(&served, &messages);
    let cached = &second["usage"]["prompt_tokens_details"]["cached_tokens"];
    let read = first["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(cached.as_u64().unwrap() >= read - 4, "{cached} of {read}");
    // What was written is read again: the answer is that of a server which has seen nothing.
    assert!(cached.as_u64().unwrap() <= read);
    let fresh = Served::start(&model.path, &[]);
    assert_eq!(content(&chat(&fresh, &messages)), content(&second));
}

#[test]
fn a_stream_of_a_chat_is_what_clients_expect() {
    let model = model();
    let served = Served::start(&model.path, &[]);
    let mut request = json!({
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The history of"}],
        "temperature": 0, "max_completion_tokens": 12, "n": 2,
    });
    let whole = served.post("/v1/chat/completions", &request).json();
    request["stream"] = true.into();
    request["stream_options"] = json!({"include_usage": true});
    let reply = served.post("/v1/chat/completions", &request);
    assert!(
        reply.head.contains("content-type: text/event-stream"),
        "{}",
        reply.head
    );
    assert!(reply.body.ends_with("data: [DONE]\n\n"));
    let chunks = events(&reply.body);
    for index in 0..2 {
        let of_choice: Vec<&Json> = chunks
            .iter()
            .flat_map(|chunk| chunk["choices"].as_array().unwrap())
            .filter(|choice| choice["index"] == index)
            .collect();
        assert_eq!(of_choice[0]["delta"]["role"], "assistant");
        let parts = of_choice
            .iter()
            .filter_map(|choice| choice["delta"]["content"].as_str());
        let content: String = parts.collect();
        assert_eq!(whole["choices"][index]["message"]["content"], content);
        let last = of_choice.last().unwrap();
        assert_eq!(
            last["finish_reason"],
            whole["choices"][index]["finish_reason"]
        );
        let ended = |choice: &&&Json| !choice["finish_reason"].is_null();
        assert_eq!(of_choice.iter().filter(ended).count(), 1);
    }
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"]["completion_tokens"],
        whole["usage"]["completion_tokens"]
    );
}

#[test]
fn seeds_choices_and_settings() {
    let model = model();
    let served = Served::start(&model.path, &["--temp", "1.5", "--seed", "3"]);
    let texts = |request: Json| -> Vec<String> {
        let reply = served.post("/v1/completions", &request).json();
        let choices = reply["choices"].as_array().unwrap().clone();
        choices
            .iter()
            .map(|choice| choice["text"].as_str().unwrap().to_owned())
            .collect()
    };
    let three = json!({"prompt": "The", "max_tokens": 16, "n": 3, "seed": 5});
    let drawn = texts(three.clone());
    assert_eq!(drawn, texts(three));
    assert!(drawn[0] != drawn[1] && drawn[1] != drawn[2], "{drawn:?}");
    // The second choice has the seed after.
    assert_eq!(
        texts(json!({"prompt": "The", "max_tokens": 16, "seed": 6})),
        drawn[1..2]
    );
    let free = json!({"prompt": "The", "max_tokens": 16});
    assert_ne!(
        texts(free.clone()),
        texts(free),
        "each request without a seed has its own"
    );
    // Several prompts; the settings of the request count.
    let several =
        json!({"prompt": ["The history of", "Der Fluss"], "max_tokens": 8, "temperature": 0});
    let alone = |prompt| texts(greedy(prompt, 8)).remove(0);
    let usage = served.post("/v1/completions", &several).json()["usage"].clone();
    let read = |prompt| {
        let reply = served.post("/v1/completions", &greedy(prompt, 1)).json();
        reply["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let both = read("The history of") + read("Der Fluss");
    assert_eq!(usage["prompt_tokens"], both);
    assert_eq!(
        texts(several),
        [alone("The history of"), alone("Der Fluss")]
    );
    let tokens = served.post(
        "/tokenize",
        &json!({"content": "The history of", "add_special": true}),
    );
    let by_tokens =
        json!({"prompt": tokens.json()["tokens"], "max_tokens": 8, "temperature": 0, "echo": true});
    assert_eq!(
        texts(by_tokens),
        [format!("The history of{}", alone("The history of"))]
    );
}

#[test]
fn stop_strings_and_log_probabilities() {
    let model = model();
    let served = Served::start(&model.path, &[]);
    let mut request = greedy("The history of", 40);
    let text = text_of(&served.post("/v1/completions", &request).json());
    // From the middle of a word on, across words.
    let (start, stop) = (text.len() / 2, &text[text.len() / 2..text.len() / 2 + 6]);
    let start = text.find(stop).unwrap_or(start);
    request["stop"] = json!([stop, "never"]);
    for stream in [false, true] {
        request["stream"] = stream.into();
        let reply = served.post("/v1/completions", &request);
        let chunks = if stream {
            events(&reply.body)
        } else {
            vec![reply.json()]
        };
        let stopped: String = chunks.iter().map(text_of).collect();
        assert_eq!(stopped, text[..start], "stream {stream}");
        let finish = chunks
            .iter()
            .rev()
            .find_map(|chunk| chunk["choices"][0]["finish_reason"].as_str());
        assert_eq!(finish, Some("stop"));
    }

    let request = json!({
        "messages": [{"role": "user", "content": "The history of"}],
        "temperature": 0, "max_tokens": 8, "logprobs": true, "top_logprobs": 4,
    });
    let reply = served.post("/v1/chat/completions", &request).json();
    let tokens = reply["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(
        tokens.len(),
        reply["usage"]["completion_tokens"].as_u64().unwrap() as usize
    );
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(
            (top.len(), &top[0]["token"]),
            (4, &token["token"]),
            "greedy takes the likeliest"
        );
        let logprobs: Vec<f64> = top
            .iter()
            .map(|top| top["logprob"].as_f64().unwrap())
            .collect();
        assert!(
            logprobs.is_sorted_by(|a, b| a >= b) && logprobs[0] <= 0.0,
            "{logprobs:?}"
        );
        let sum: f64 = logprobs.iter().map(|logprob| logprob.exp()).sum();
        assert!(sum <= 1.0 + 1e-6, "{sum}");
    }
    // A banned token does not come, but the model's opinion of it is told.
    let first = &tokens[0]["token"];
    let id = served.post("/tokenize", &json!({"content": first})).json()["tokens"]
        .as_array()
        .unwrap()
        .last()
        .unwrap()
        .clone();
    let mut banned = request;
    banned["logit_bias"] = json!({id.to_string(): -100});
    let reply = served.post("/v1/chat/completions", &banned).json();
    let token = &reply["choices"][0]["logprobs"]["content"][0];
    assert_ne!(&token["token"], first);
    assert_eq!(&token["top_logprobs"][0]["token"], first);
}

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
    let late = served::read(lazy);
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
    assert_eq!(served::read(body).status, 408);
    served::until_closed(half);
    assert!(start.elapsed() < Duration::from_secs(10));
    // A body that is cut off.
    let mut cut = served.connect();
    cut.write_all(
        b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    )
    .unwrap();
    cut.shutdown(std::net::Shutdown::Write).unwrap();
    served::until_closed(cut);
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
    let reply = served::read(stream);
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
        assert!(!served::read(stream).body.ends_with("data: [DONE]\n\n"));
    }
}

#[test]
fn an_address_in_use_is_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = std::process::Command::new(served::binary())
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

#[test]
fn answers_follow_schemas_and_grammars() {
    let model = model();
    let served = Served::start(&model.path, &["--temp", "1", "--seed", "1"]);
    let chat = |more: Json| {
        let mut request =
            json!({"messages": [{"role": "user", "content": "The"}], "max_tokens": 200});
        request
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        served.post("/v1/chat/completions", &request)
    };
    let schema = json!({
        "type": "object",
        "properties": {"size": {"type": "integer", "minimum": 1, "maximum": 9}, "big": {"type": "boolean"}},
        "required": ["size", "big"], "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}});
    for more in [
        json!({"response_format": format, "n": 4}),
        json!({"json_schema": schema, "n": 4}),
        json!({"response_format": {"type": "json_object", "schema": schema}}),
    ] {
        let reply = chat(more).json();
        for choice in reply["choices"].as_array().unwrap() {
            let text = choice["message"]["content"].as_str().unwrap();
            let value: Json =
                serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert!(
                (1..=9).contains(&value["size"].as_i64().unwrap()) && value["big"].is_boolean(),
                "{text}"
            );
            assert_eq!(choice["finish_reason"], "stop");
        }
    }
    let reply = chat(json!({"regex": "[a-c]{5}"})).json();
    let text = reply["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(
        text.len() == 5 && text.bytes().all(|byte| (b'a'..=b'c').contains(&byte)),
        "{text}"
    );
    let request =
        json!({"prompt": "The", "grammar": "root ::= \" \"? \"yes\" | \"no\"", "max_tokens": 9});
    let text = text_of(&served.post("/v1/completions", &request).json());
    assert!(["yes", " yes", "no"].contains(&&text[..]), "{text:?}");
    for (more, told) in [
        (json!({"regex": "("}), "grammar"),
        (json!({"regex": "a", "json_schema": {}}), "only one"),
        (
            json!({"response_format": {"type": "xml"}}),
            "response_format",
        ),
        (
            json!({"response_format": {"type": "json_schema"}}),
            "schema",
        ),
    ] {
        let reply = chat(more);
        assert_eq!(reply.status, 400, "{}", reply.body);
        assert!(reply.body.contains(told), "{}", reply.body);
    }
}

#[test]
fn tools_are_called_and_answered() {
    let model = model();
    // A template that knows tools, and one that does not.
    for template in ["mistral-v3", "chatml"] {
        let served = Served::start(
            &model.path,
            &["--template", template, "--temp", "1", "--seed", "2"],
        );
        let tool = |name: &str, parameters: Json| json!({"type": "function", "function": {"name": name, "description": "x", "parameters": parameters}});
        let tools = json!([
            tool(
                "count",
                json!({
                    "type": "object", "properties": {"to": {"$ref": "#/$defs/small"}}, "required": ["to"],
                    "additionalProperties": false, "$defs": {"small": {"enum": [1, 2, 3]}},
                })
            ),
            tool(
                "wait",
                json!({"type": "object", "properties": {}, "additionalProperties": false})
            ),
        ]);
        let mut request = json!({
            "messages": [{"role": "user", "content": "Count!"}], "tools": tools, "max_tokens": 200,
            "tool_choice": {"type": "function", "function": {"name": "count"}}, "parallel_tool_calls": false,
        });
        let reply = served.post("/v1/chat/completions", &request).json();
        let choice = &reply["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{reply}");
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(
            (calls.len(), &calls[0]["function"]["name"]),
            (1, &json!("count"))
        );
        assert_eq!(calls[0]["id"].as_str().unwrap().len(), 9);
        let arguments: Json =
            serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap();
        assert!(
            (1..=3).contains(&arguments["to"].as_i64().unwrap()),
            "{arguments}"
        );

        // As a stream.
        request["stream"] = true.into();
        request["tool_choice"] = "required".into();
        let chunks = events(&served.post("/v1/chat/completions", &request).body);
        let deltas: Vec<&Json> = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0]["delta"])
            .collect();
        let call = deltas
            .iter()
            .find_map(|delta| delta["tool_calls"].as_array())
            .unwrap();
        assert!(["count", "wait"].contains(&call[0]["function"]["name"].as_str().unwrap()));
        assert_eq!(call[0]["index"], 0);
        assert!(
            deltas
                .iter()
                .all(|delta| delta["content"].as_str().is_none_or(str::is_empty))
        );
        assert_eq!(
            chunks.last().unwrap()["choices"][0]["finish_reason"],
            "tool_calls"
        );

        // The result goes back.
        let call = calls[0].clone();
        request["stream"] = false.into();
        request["tool_choice"] = "none".into();
        request["max_tokens"] = 4.into();
        let messages = request["messages"].as_array_mut().unwrap();
        messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
        messages.push(json!({"role": "tool", "tool_call_id": call["id"], "content": "3"}));
        let reply = served.post("/v1/chat/completions", &request);
        assert_eq!(reply.status, 200, "{}", reply.body);
        for (choice, told) in [
            (json!("sometimes"), "tool_choice"),
            (json!({"function": {"name": "x"}}), "no such tool"),
        ] {
            request["tool_choice"] = choice;
            let reply = served.post("/v1/chat/completions", &request);
            assert!(
                reply.status == 400 && reply.body.contains(told),
                "{}",
                reply.body
            );
        }
    }
}

#[test]
fn embeddings_are_pooled_hidden_states() {
    let model = model();
    let served = Served::start(&model.path, &["--slots", "2"]);
    let embed = |input: Json| -> Vec<Vec<f64>> {
        let reply = served
            .post("/v1/embeddings", &json!({"input": input}))
            .json();
        let data = reply["data"]
            .as_array()
            .unwrap_or_else(|| panic!("{reply}"))
            .clone();
        let vector = |item: &Json| {
            let vector = item["embedding"].as_array().unwrap().clone();
            vector.iter().map(|x| x.as_f64().unwrap()).collect()
        };
        data.iter().map(vector).collect()
    };
    let texts = json!([
        "The history of the river",
        "The history of the city",
        "Der Fluss ist lang"
    ]);
    let vectors = embed(texts);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    assert!(
        vectors
            .iter()
            .all(|vector| (dot(vector, vector) - 1.0).abs() < 1e-5)
    );
    assert!(dot(&vectors[0], &vectors[1]) > dot(&vectors[0], &vectors[2]));
    // Alone, and after others have used the sessions: the same bits.
    assert_eq!(embed(json!("Der Fluss ist lang"))[0], vectors[2]);
    let tokens = served
        .post(
            "/tokenize",
            &json!({"content": "Der Fluss ist lang", "add_special": true}),
        )
        .json();
    assert_eq!(embed(tokens["tokens"].clone())[0], vectors[2]);
    // The mean, by hand.
    let engine = model.load(&fewbit::engine::Options::default());
    let ids = engine
        .tokenizer()
        .encode_with_bos("Der Fluss ist lang", true)
        .unwrap();
    let mut session = engine.session(ids.len()).unwrap();
    let mut sum = vec![0.0; engine.shape().hidden];
    let add = |_, hidden: &[f32]| {
        sum.iter_mut()
            .zip(hidden)
            .for_each(|(sum, &x)| *sum += f64::from(x))
    };
    session.hidden_states(&ids, add).unwrap();
    let length = dot(&sum, &sum).sqrt();
    let error = sum
        .iter()
        .zip(&vectors[2])
        .map(|(x, y)| (x / length - y).abs())
        .fold(0.0, f64::max);
    assert!(error < 1e-6, "{error}");
    // The hidden states are what the logits are computed from: they change nothing for what follows.
    let text = served
        .post("/v1/completions", &greedy("Der Fluss ist lang", 8))
        .json();
    let fresh = Served::start(&model.path, &[]);
    assert_eq!(
        text_of(&text),
        text_of(
            &fresh
                .post("/v1/completions", &greedy("Der Fluss ist lang", 8))
                .json()
        )
    );
    let base64 = served
        .post(
            "/v1/embeddings",
            &json!({"input": "x", "encoding_format": "base64"}),
        )
        .json();
    let bytes = 4 * engine.shape().hidden;
    assert_eq!(
        base64["data"][0]["embedding"].as_str().unwrap().len(),
        bytes.div_ceil(3) * 4
    );
    assert_eq!(
        served
            .post("/v1/embeddings", &json!({"input": "x", "dimensions": 3}))
            .status,
        400
    );
}

#[test]
fn the_page_is_served_and_loads_nothing_from_elsewhere() {
    let model = model();
    let served = Served::start(&model.path, &["--api-key", "secret"]);
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/page.css", "text/css"),
    ] {
        let file = served.send("GET", path, &[], "");
        assert_eq!(file.status, 200, "the page itself needs no key");
        assert!(
            file.head.contains(kind)
                && file
                    .head
                    .contains("content-security-policy: default-src 'none'")
        );
        let foreign = |line: &&str| {
            line.contains("src=\"http") || line.contains("href=\"http") || line.contains("url(http")
        };
        assert_eq!(file.body.lines().find(foreign), None, "{path}");
        assert!(!file.body.contains("innerHTML"), "{path}");
    }
    assert_eq!(served.send("GET", "/props", &[], "").status, 401);
}
