//! Which container is meant: by id, by the beginning of an id, or by pod and container name.

use std::collections::BTreeMap;

use crate::exit::Failure;

const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
const POD_NAME: &str = "io.kubernetes.pod.name";
const CONTAINER_NAME: &str = "io.kubernetes.container.name";
/// Of containerd's CRI plugin: `sandbox` or `container`.
const KIND: &str = "io.cri-containerd.kind";

/// What a container's task is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State {
    /// Running or paused: it can be checkpointed.
    pub(crate) alive: bool,
    /// It stands still.
    pub(crate) paused: bool,
    /// For messages.
    pub(crate) word: String,
    /// Whether its init process has a terminal.
    pub(crate) terminal: bool,
    /// The pid of its init process; 0 where there is none.
    pub(crate) pid: u32,
}

impl Default for State {
    fn default() -> Self {
        Self {
            alive: false,
            paused: false,
            word: "without a task".to_owned(),
            terminal: false,
            pid: 0,
        }
    }
}

/// A container as containerd knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Container {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) image: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) state: State,
}

impl Container {
    fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }

    /// The namespace its images belong to: the pod's under CRI, containerd's own otherwise. The shim
    /// decides by the bundle's annotations, which CRI writes from the same pod.
    pub(crate) fn image_namespace(&self) -> &str {
        self.label(POD_NAMESPACE).unwrap_or(&self.namespace)
    }

    /// `<namespace>/<name>` of its pod.
    pub(crate) fn pod(&self) -> Option<String> {
        Some(format!(
            "{}/{}",
            self.label(POD_NAMESPACE)?,
            self.label(POD_NAME)?
        ))
    }

    /// For messages: what a person would type, and where it lies.
    fn shown(&self) -> String {
        let id: String = self.id.chars().take(13).collect();
        match (
            self.label(POD_NAMESPACE),
            self.label(POD_NAME),
            self.label(CONTAINER_NAME),
        ) {
            (Some(namespace), Some(pod), Some(name)) => {
                format!("{namespace}/{pod}/{name} ({id}, {})", self.state.word)
            }
            _ => format!("{id} (in {}, {})", self.namespace, self.state.word),
        }
    }

    /// Whether `query` is `pod/container` or `namespace/pod/container` of this one.
    fn has_cri_name(&self, query: &str) -> bool {
        let (Some(pod), Some(name)) = (self.label(POD_NAME), self.label(CONTAINER_NAME)) else {
            return false;
        };
        let mut parts = query.rsplitn(3, '/');
        parts.next() == Some(name)
            && parts.next() == Some(pod)
            && parts
                .next()
                .is_none_or(|asked| self.label(POD_NAMESPACE) == Some(asked))
    }
}

/// The one container that `query` means.
///
/// A full id wins; then a pod's container by name, of which only a living one counts (a restarted
/// container leaves its dead predecessors behind); then the beginning of an id.
/// `searched` are the namespaces that `containers` come from, and `doing` is what is to be done with it.
pub(crate) fn select(
    query: &str,
    doing: &str,
    searched: &[&str],
    containers: Vec<Container>,
) -> Result<Container, Failure> {
    let containers: Vec<Container> = containers
        .into_iter()
        .filter(|container| container.label(KIND) != Some("sandbox"))
        .collect();
    let matching = |test: &dyn Fn(&Container) -> bool| -> Vec<Container> {
        containers.iter().filter(|c| test(c)).cloned().collect()
    };
    let mut found = matching(&|c| c.id == query);
    if found.is_empty() {
        found = matching(&|c| c.has_cri_name(query));
        if found.iter().any(|c| c.state.alive) {
            found.retain(|c| c.state.alive);
        }
    }
    if found.is_empty() && !query.is_empty() {
        found = matching(&|c| c.id.starts_with(query));
    }
    match found.as_slice() {
        [] => Err(Failure::NotFound(format!(
            "container {query:?}: no id, beginning of an id or pod/container of that name in containerd namespace {}",
            searched.join(" or ")
        ))),
        [one] if one.state.alive => Ok(one.clone()),
        [one] => Err(Failure::Refused(format!(
            "container {}: only a running or paused container can be {doing}",
            one.shown()
        ))),
        several => {
            let shown: Vec<String> = several.iter().map(Container::shown).collect();
            Err(Failure::Refused(format!(
                "container {query:?} is ambiguous: {}; give the full id, namespace/pod/container, or --containerd-namespace",
                shown.join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(
        namespace: &str,
        id: &str,
        cri: Option<(&str, &str, &str)>,
        alive: bool,
    ) -> Container {
        let labels = cri
            .map(|(namespace, pod, name)| {
                [
                    (POD_NAMESPACE, namespace),
                    (POD_NAME, pod),
                    (CONTAINER_NAME, name),
                ]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into()
            })
            .unwrap_or_default();
        let word = if alive { "running" } else { "stopped" }.to_owned();
        Container {
            namespace: namespace.into(),
            id: id.into(),
            image: String::new(),
            labels,
            state: State {
                alive,
                paused: false,
                word,
                terminal: false,
                pid: 0,
            },
        }
    }

    fn node() -> Vec<Container> {
        vec![
            container("k8s.io", "aa11", Some(("team-a", "web-0", "server")), false),
            container("k8s.io", "aa22", Some(("team-a", "web-0", "server")), true),
            container("k8s.io", "bb33", Some(("team-b", "web-0", "server")), true),
            container("k8s.io", "bb44", Some(("team-b", "web-0", "proxy")), true),
            container("default", "demo", None, true),
            container("default", "demo-2", None, true),
            container("default", "dead", None, false),
        ]
    }

    fn look_for(query: &str) -> Result<Container, Failure> {
        select(query, "checkpointed", &["k8s.io", "default"], node())
    }

    #[test]
    fn one_container_is_found_in_each_way() {
        for (query, id) in [
            ("aa22", "aa22"),
            ("bb4", "bb44"),
            ("web-0/proxy", "bb44"),
            ("team-a/web-0/server", "aa22"),
            ("demo", "demo"),
        ] {
            assert_eq!(look_for(query).unwrap().id, id, "{query}");
        }
    }

    #[test]
    fn none_several_and_dead_are_told_apart() {
        let words = |query: &str| look_for(query).unwrap_err().to_string();
        assert!(matches!(look_for("zz"), Err(Failure::NotFound(_))));
        assert!(words("zz").contains("k8s.io or default"), "{}", words("zz"));
        assert!(words("aa").contains("ambiguous"), "{}", words("aa"));
        assert!(
            words("web-0/server").contains("team-b/web-0/server"),
            "{}",
            words("web-0/server")
        );
        assert!(
            words("dead").contains("only a running or paused"),
            "{}",
            words("dead")
        );
        assert!(matches!(look_for(""), Err(Failure::NotFound(_))));
    }

    #[test]
    fn an_images_namespace_is_the_pods_under_cri() {
        assert_eq!(look_for("bb33").unwrap().image_namespace(), "team-b");
        assert_eq!(look_for("demo").unwrap().image_namespace(), "default");
    }
}
