//! Chat templates: a conversation as the text that the model was trained on.
//!
//! The dialect of Hugging Face's `apply_chat_template` (Jinja with Python's methods, `raise_exception`,
//! `strftime_now`, `tojson` without HTML escapes, trimmed blocks). A template comes with a model file,
//! so instructions, recursion and output are bounded. Start at [`ChatTemplate::render`].

#[cfg(test)]
mod tests;

use std::{
    io::{self, Write},
    time::{SystemTime, UNIX_EPOCH},
};

use minijinja::{Environment, ErrorKind, Value, syntax::SyntaxConfig, value::Kwargs};

use super::{Error, Message};

/// Instructions of the template engine, for a conversation and for each message: some ten times what known templates need.
const FUEL: u64 = 100_000;
const FUEL_A_MESSAGE: u64 = 5_000;
/// Bytes that a template may add to the messages' own, for a conversation and for each message.
const MAX_ADDED_BYTES: usize = 1 << 18;
const MAX_ADDED_BYTES_A_MESSAGE: usize = 1 << 12;
const NAME: &str = "chat_template";

/// A model's chat template, compiled once.
pub(super) enum ChatTemplate {
    /// The model has none.
    None,
    /// It has one that does not compile, with the reason.
    Broken(String),
    /// The environment that holds it.
    Ready {
        environment: Box<Environment<'static>>,
        bos: String,
        eos: String,
    },
}

impl ChatTemplate {
    pub(super) fn new(source: Option<String>, bos: &str, eos: &str) -> Self {
        let Some(source) = source else {
            return Self::None;
        };
        match environment(&source) {
            Ok(environment) => Self::Ready {
                environment: Box::new(environment),
                bos: bos.to_owned(),
                eos: eos.to_owned(),
            },
            Err(error) => Self::Broken(describe(&error)),
        }
    }

    /// The conversation's text with the beginning of the assistant's next turn.
    pub(super) fn render(&self, messages: &[Message]) -> Result<String, Error> {
        let (environment, bos, eos) = match self {
            Self::None => return Err(Error::NoChatTemplate),
            Self::Broken(what) => return Err(Error::Template { what: what.clone() }),
            Self::Ready {
                environment,
                bos,
                eos,
            } => (environment, bos, eos),
        };
        let turn = |message: &Message| {
            Value::from_pairs([
                ("role", message.role.as_str()),
                ("content", message.content.as_str()),
            ])
        };
        let context = Value::from_pairs([
            ("messages", messages.iter().map(turn).collect::<Value>()),
            ("add_generation_prompt", Value::from(true)),
            ("bos_token", Value::from(bos)),
            ("eos_token", Value::from(eos)),
            // As transformers has them in a conversation without tools.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        let count = messages.len();
        let said: usize = messages
            .iter()
            .map(|message| message.role.len() + message.content.len())
            .sum();
        let mut output = Bounded {
            text: Vec::new(),
            limit: said + MAX_ADDED_BYTES + count * MAX_ADDED_BYTES_A_MESSAGE,
        };
        let mut environment = Environment::clone(environment);
        environment.set_fuel(Some(FUEL + FUEL_A_MESSAGE * count as u64));
        let template = environment
            .get_template(NAME)
            .map_err(|error| failed(&error))?;
        template
            .render_captured_to(context, &mut output)
            .map_err(|error| failed(&error))?;
        String::from_utf8(output.text).map_err(|_| Error::Template {
            what: "its output is not UTF-8".into(),
        })
    }
}

fn environment(source: &str) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment.add_template_owned(NAME, without_generation_marks(source))?;
    Ok(environment)
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// JSON as Python writes it: Jinja's own filter also escapes what HTML minds.
fn tojson(
    value: &Value,
    indent: Option<Value>,
    options: Kwargs,
) -> Result<Value, minijinja::Error> {
    // Accepted as transformers accepts it; the text is never escaped to ASCII.
    let _ = options.get::<Option<bool>>("ensure_ascii")?;
    let escaped = minijinja::filters::tojson(value, indent, options)?;
    let escaped = escaped.as_str().unwrap_or_default();
    let mut json = String::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some(at) = rest.find('\\') {
        json.push_str(&rest[..at]);
        rest = &rest[at..];
        let plain = [
            ("\\u003c", '<'),
            ("\\u003e", '>'),
            ("\\u0026", '&'),
            ("\\u0027", '\''),
        ];
        if let Some((escape, plain)) = plain
            .into_iter()
            .find(|(escape, _)| rest.starts_with(escape))
        {
            json.push(plain);
            rest = &rest[escape.len()..];
        } else {
            // The backslash and what it escapes, which may be another backslash.
            let length = 1 + rest[1..].chars().next().map_or(0, char::len_utf8);
            json.push_str(&rest[..length]);
            rest = &rest[length..];
        }
    }
    json.push_str(rest);
    Ok(Value::from(json))
}

/// The current time in UTC, by the codes of C's strftime that templates use.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs());
    strftime(format, seconds)
}

/// `seconds` since 1970 in UTC. The calendar is Howard Hinnant's `civil_from_days`.
fn strftime(format: &str, seconds: u64) -> Result<String, minijinja::Error> {
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12;
    let year = year_of_era + era * 400 + u64::from(month < 2);
    let weekday = DAYS[(days % 7) as usize];
    let month_name = MONTHS[month as usize];
    let (hour, minute) = (second / 3_600, second / 60 % 60);
    let mut text = String::new();
    let mut codes = format.chars();
    while let Some(c) = codes.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let part = match codes.next() {
            Some('Y') => format!("{year:04}"),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{:02}", month + 1),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('d') => format!("{day:02}"),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('F') => format!("{year:04}-{:02}-{day:02}", month + 1),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{:02}", second % 60),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('Z') => "UTC".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let what = format!(
                    "strftime_now does not know the code %{}",
                    other.map_or(String::new(), String::from)
                );
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, what));
            }
        };
        text.push_str(&part);
    }
    Ok(text)
}

/// `{% generation %}` only marks for training what the assistant said; here it is a block like any other.
fn without_generation_marks(source: &str) -> String {
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let Some(length) = rest[at..].find("%}") else {
            break;
        };
        let (before, tag) = (&rest[..at], &rest[at..at + length]);
        plain.push_str(before);
        match tag[2..].trim_matches(['-', '+', ' ', '\t', '\r', '\n']) {
            "generation" => plain.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => plain.push_str(&tag.replace("endgeneration", "endif")),
            _ => plain.push_str(tag),
        }
        rest = &rest[at + length..];
    }
    plain.push_str(rest);
    plain
}

/// A text that ends with an error when it gets too long.
struct Bounded {
    text: Vec<u8>,
    limit: usize,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > self.limit {
            return Err(io::Error::other(format!(
                "its output is longer than {} bytes",
                self.limit
            )));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn failed(error: &minijinja::Error) -> Error {
    Error::Template {
        what: describe(error),
    }
}

/// The error with its causes.
fn describe(error: &minijinja::Error) -> String {
    let mut what = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        what.push_str(": ");
        what.push_str(&error.to_string());
        cause = error.source();
    }
    what
}

/// Hides what messages spell like special tokens from the search for them: each spelling becomes one character that no
/// message contains, and turns back once the template's own special tokens have been found.
pub(super) struct Veil<'a> {
    /// The character for each spelling that occurs, the longest spelling first.
    pairs: Vec<(char, &'a str)>,
}

impl<'a> Veil<'a> {
    /// `specials`: spellings of special tokens, the longest first.
    pub(super) fn new(messages: &[Message], specials: &[&'a str]) -> Result<Self, Error> {
        let texts = || {
            messages
                .iter()
                .flat_map(|message| [message.role.as_str(), message.content.as_str()])
        };
        let occurring = specials
            .iter()
            .copied()
            .filter(|special| texts().any(|text| text.contains(special)));
        let occurring: Vec<&str> = occurring.collect();
        if occurring.is_empty() {
            return Ok(Self { pairs: Vec::new() });
        }
        // Private-use characters of the planes 15 and 16.
        let used: std::collections::HashSet<char> = texts()
            .flat_map(str::chars)
            .filter(|&c| c >= '\u{f0000}')
            .collect();
        let free = ('\u{f0000}'..='\u{10fffd}').filter(|c| !used.contains(c));
        let pairs: Vec<(char, &str)> = free.zip(occurring.iter().copied()).collect();
        if pairs.len() < occurring.len() {
            return Err(Error::Template {
                what: "messages of all private-use characters and special tokens".into(),
            });
        }
        Ok(Self { pairs })
    }

    pub(super) fn messages(&self, messages: &[Message]) -> Vec<Message> {
        let veiled = |text: &str| {
            self.pairs
                .iter()
                .fold(text.to_owned(), |text, &(mark, spelling)| {
                    text.replace(spelling, mark.encode_utf8(&mut [0; 4]))
                })
        };
        messages
            .iter()
            .map(|message| Message {
                role: veiled(&message.role),
                content: veiled(&message.content),
            })
            .collect()
    }

    pub(super) fn lift(&self, text: &str) -> String {
        self.pairs
            .iter()
            .fold(text.to_owned(), |text, &(mark, spelling)| {
                text.replace(mark, spelling)
            })
    }
}
