//! Completions and chats: what they hold.

use quant_tests::fixture;
use serde_json::{Value as Json, json};

use super::served::{Served, events, text_of};
use super::{greedy, model};

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
    let run = std::process::Command::new(fixture::binary())
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
