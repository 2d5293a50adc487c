//! Asks the running gateway.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use control::api::{Command, request_line};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{ClientArgs, Failure};

/// A reload of many SAs takes a while.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sends one request, returns the data of the answer.
pub(super) fn ask_value(client: &ClientArgs, command: &Command) -> Result<Value, Failure> {
    let answer = exchange(&client.socket, command).map_err(|e| unreachable(client, &e))?;
    data_of(answer)
}

/// Sends one request, hands over the data of every line that follows for as long as they are wanted.
pub(super) fn stream(
    client: &ClientArgs,
    command: &Command,
    take: &mut dyn FnMut(Value) -> Result<bool, Failure>,
) -> Result<(), Failure> {
    let lost = |e: std::io::Error| unreachable(client, &e);
    let mut stream = UnixStream::connect(&client.socket).map_err(lost)?;
    stream
        .write_all(request_line(command).as_bytes())
        .map_err(lost)?;
    for line in BufReader::new(stream).lines() {
        let answer = serde_json::from_str(&line.map_err(lost)?)
            .map_err(|e| Failure::failed(format!("the gateway's answer is not understood: {e}")))?;
        if !take(data_of(answer)?)? {
            return Ok(());
        }
    }
    Err(Failure::unreachable("the gateway has ended the stream"))
}

fn unreachable(client: &ClientArgs, e: &std::io::Error) -> Failure {
    Failure::unreachable(format!(
        "{}: no gateway answers: {e}",
        client.socket.display()
    ))
}

fn data_of(mut answer: Value) -> Result<Value, Failure> {
    if answer["ok"].as_bool() == Some(true) {
        return Ok(answer["data"].take());
    }
    Err(Failure::failed(
        answer["error"]
            .as_str()
            .unwrap_or("the gateway's answer is not understood"),
    ))
}

/// As [`ask_value`], decoded.
pub(super) fn ask<T: DeserializeOwned>(
    client: &ClientArgs,
    command: &Command,
) -> Result<T, Failure> {
    let value = ask_value(client, command)?;
    serde_json::from_value(value)
        .map_err(|e| Failure::failed(format!("the gateway's answer is not understood: {e}")))
}

fn exchange(socket: &Path, command: &Command) -> std::io::Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(request_line(command).as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    if line.is_empty() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}
