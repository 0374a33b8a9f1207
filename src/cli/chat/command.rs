//! What can be typed beside messages: `/help` and the others.

use crate::sampler::Settings;

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Help,
    /// Shows the system message.
    ShowSystem,
    /// Sets it, or takes it away.
    System(Option<String>),
    Reset,
    Undo,
    Retry,
    Save(Option<String>),
    Load(Option<String>),
    /// Shows what can be set.
    ShowSettings,
    Set(String, String),
    Stats,
    Quit,
}

/// The list of commands.
pub const HELP: &str = "\
/system [TEXT]    show the system message, or set it (@FILE: from a file; -: none)
/reset            forget the conversation but for the system message
/undo             take the last question and its answer back
/retry            answer the last question anew
/save [FILE]      write the conversation to a file, with all that was read
/load [FILE]      take up a conversation from its file, at once
/set [NAME VALUE] show the settings, or change one: temperature, top_k, seed, …
/stats            tokens, speed, context, memory
/quit             leave (Ctrl-D too)
/help             this list
Ctrl-C stops an answer. A message goes on after a backslash at a line's end, after
Alt-Enter, and between \"\"\" and \"\"\". A space before / makes it a message.";

/// Names of what can be set beside the sampler's settings.
pub const OPTIONS: [&str; 6] = ["n", "seed", "stop", "draft", "overflow", "markdown"];

const NAMES: [&str; 11] = [
    "/help", "/system", "/reset", "/undo", "/retry", "/save", "/load", "/set", "/stats", "/quit",
    "/exit",
];

/// Names of the sampler's settings.
pub fn settings() -> Vec<String> {
    match serde_json::to_value(Settings::default()) {
        Ok(serde_json::Value::Object(fields)) => fields.keys().cloned().collect(),
        _ => Vec::new(),
    }
}

/// What a word may be after `typed`, the words before it.
pub fn completions(typed: &str) -> Vec<String> {
    match typed.trim_start() {
        "" => NAMES.map(str::to_owned).to_vec(),
        "/set " => {
            let options = OPTIONS.map(str::to_owned);
            settings().into_iter().chain(options).collect()
        }
        _ => Vec::new(),
    }
}

/// What was typed, if it is a command: a word behind a slash. An error where there is no such command, or
/// it is given too little or too much.
pub fn parse(text: &str) -> Option<Result<Command, String>> {
    let word = text.strip_prefix('/')?;
    let (name, rest) = word.split_once(char::is_whitespace).unwrap_or((word, ""));
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphabetic()) {
        // A path, say.
        return None;
    }
    let rest = rest.trim();
    let given = || (!rest.is_empty()).then(|| rest.to_owned());
    let alone = |command| match given() {
        None => Ok(command),
        Some(_) => Err(format!("/{name} takes nothing after it")),
    };
    Some(match name {
        "help" => alone(Command::Help),
        "system" => Ok(match rest {
            "" => Command::ShowSystem,
            "-" => Command::System(None),
            text => Command::System(Some(text.to_owned())),
        }),
        "reset" | "clear" => alone(Command::Reset),
        "undo" => alone(Command::Undo),
        "retry" => alone(Command::Retry),
        "save" => Ok(Command::Save(given())),
        "load" => Ok(Command::Load(given())),
        "set" => match rest.split_once([' ', '=', '\t']) {
            Some((name, value)) => {
                let name = name.trim_start_matches('-').replace('-', "_");
                Ok(Command::Set(name, value.trim().to_owned()))
            }
            None if rest.is_empty() => Ok(Command::ShowSettings),
            None => Err(format!("/set {rest} lacks a value")),
        },
        "stats" => alone(Command::Stats),
        "quit" | "exit" | "bye" => alone(Command::Quit),
        _ => Err(format!(
            "there is no /{name}; /help lists what there is, and a space before the slash makes it a message"
        )),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_words_behind_a_slash() {
        assert_eq!(parse("/help"), Some(Ok(Command::Help)));
        let set = |name: &str, value: &str| Some(Ok(Command::Set(name.into(), value.into())));
        assert_eq!(parse("/set top-k 3"), set("top_k", "3"));
        assert_eq!(parse("/set temp=0.5"), set("temp", "0.5"));
        assert_eq!(parse("/set"), Some(Ok(Command::ShowSettings)));
        assert_eq!(
            parse("/system  Be brief. "),
            Some(Ok(Command::System(Some("Be brief.".into()))))
        );
        assert_eq!(parse("/system -"), Some(Ok(Command::System(None))));
        assert_eq!(
            parse("/save a b.session"),
            Some(Ok(Command::Save(Some("a b.session".into()))))
        );
        for message in ["hello", " /help", "/etc/passwd", "/", "/ help", "//", "/1"] {
            assert_eq!(parse(message), None, "{message}");
        }
        for wrong in ["/hlep", "/hlep me", "/reset all", "/set top_k"] {
            assert!(matches!(parse(wrong), Some(Err(_))), "{wrong}");
        }
    }

    #[test]
    fn commands_and_settings_are_completed() {
        assert!(completions("").contains(&"/retry".to_owned()));
        assert!(completions("/set ").contains(&"temperature".to_owned()));
        assert!(completions("/set ").contains(&"overflow".to_owned()));
        assert!(completions("What is ").is_empty());
    }
}
