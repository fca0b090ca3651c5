//! `rekindle completion SHELL`.

use std::{io, process::ExitCode};

use clap::{Args, CommandFactory as _, ValueEnum};
use clap_complete::Shell;

use crate::cli::Cli;

const EXAMPLES: &str = "\
Examples:
  rekindle completion bash > /usr/share/bash-completion/completions/rekindle
  rekindle completion zsh  > /usr/local/share/zsh/site-functions/_rekindle
  rekindle completion fish > ~/.config/fish/completions/rekindle.fish";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompletionArgs {
    /// The shell.
    shell: Supported,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Supported {
    Bash,
    Zsh,
    Fish,
}

pub(crate) fn run(args: CompletionArgs) -> ExitCode {
    let shell = match args.shell {
        Supported::Bash => Shell::Bash,
        Supported::Zsh => Shell::Zsh,
        Supported::Fish => Shell::Fish,
    };
    clap_complete::generate(shell, &mut Cli::command(), "rekindle", &mut io::stdout());
    ExitCode::SUCCESS
}
