//! The demo: a real PyTorch server, its weights from S3, cold and warm. `make demo` runs it.

#[path = "demo/story.rs"]
mod story;
#[path = "demo/tell.rs"]
mod tell;

use std::process::ExitCode;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // Whichever way this ends, the node goes with it: dropped here, or by its keeper when this process is killed.
    tokio::select! {
        told = story::tell() => match told {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tell::failure(&error);
                ExitCode::FAILURE
            }
        },
        _ = tokio::signal::ctrl_c() => {
            tell::interrupted();
            // What a shell reports of a program that SIGINT ended.
            ExitCode::from(130)
        }
    }
}
