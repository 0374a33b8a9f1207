//! Grammars, tools, embeddings and the page.

use serde_json::{Value as Json, json};

use super::served::{Served, events, text_of};
use super::{greedy, model};

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
