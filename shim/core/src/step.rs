//! The steps of long operations, by the names that the log has (`step="hold"`).

use std::fmt;

macro_rules! steps {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $step:ident = $text:literal)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($(#[$doc])* $step,)* }

        impl $name {
            /// All of them, in their order.
            pub const ALL: &[Self] = &[$(Self::$step,)*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$step => $text,)* }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self.name(), f)
            }
        }
    };
}

steps! {
    /// The steps of a checkpoint. `docs/DESIGN.md` says what each does.
    CheckpointStep {
        /// What the image has to remember is found out.
        Facts = "facts"
        /// The image that is asked for is found.
        Where = "where"
        /// Its folder is made ready.
        Begin = "begin"
        /// Memory is stored while the tasks run.
        Precopy = "pre-copy"
        /// The tasks are stopped.
        Hold = "hold"
        /// CRIU dumps them, and the rest of their memory is stored.
        Dump = "dump"
        /// They go on. Not with `exit`.
        Release = "release"
        /// The image is completed and published.
        Seal = "seal"
        /// The tasks are ended. Only with `exit`.
        Kill = "kill"
    }
}

steps! {
    /// The steps of a round of the node's agent. `docs/DESIGN.md` says what each does.
    AgentStep {
        /// What killed processes left is removed.
        Sweep = "sweep"
        /// The images of the node are listed, by their manifests.
        List = "list"
        /// Those that are in memory only are copied to the disk.
        Settle = "settle"
        /// Those that containers start from are copied into memory.
        Promote = "promote"
        /// Those that are not in their namespace's tier are put there.
        Replicate = "replicate"
        /// It is found out which may go.
        Plan = "plan"
        /// They are removed.
        Evict = "evict"
        /// Until the next round.
        Rest = "rest"
    }
}
