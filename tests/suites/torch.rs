//! A real model server: its weights come from S3 before it starts, and a new container continues where an image was made.
//!
//! Each test has a node of its own; they differ in how memory comes back.

use anyhow::{Context, Result};
use rekindle_harness::model::{self, Embedding};
use rekindle_harness::s3::S3Server;
use rekindle_harness::{Image, Node};

struct Stage {
    node: Node,
    image: Image,
    _s3: S3Server,
}

impl Stage {
    /// A node on which images are restored as `paging` says.
    async fn new(paging: &str) -> Result<Stage> {
        let mut prepared = model::prepare().await?;
        let toml = prepared.config.rekindle_toml.get_or_insert_default();
        toml.push_str(&format!("[restore]\npaging = \"{paging}\"\n"));
        let node = Node::start(prepared.config).await?;
        let s3 = S3Server::start(&node, model::BUCKET, model::PREFIX, &prepared.weights).await?;
        Ok(Stage {
            node,
            image: prepared.image,
            _s3: s3,
        })
    }

    /// Starts a server, cold or from an image, takes its first answer, makes an image of it and ends it.
    async fn kept_as(&self, from: Option<&str>, name: &str) -> Result<Embedding> {
        let mut server = model::server(&self.node, &self.image, &format!("to-be-{name}"));
        if let Some(from) = from {
            server = server.annotation("rekindle.dev/restore-from", from);
        }
        let container = server.run().await.context(self.node.log_tail(10))?;
        let (answer, _) = model::first_answer(&container).await?;
        let id = container.id();
        self.node
            .run(["rekindle", "checkpoint", id, "--name", name, "--exit"])
            .await?;
        container.remove().await?;
        Ok(answer)
    }

    /// The server continues from image to image: a restored one can be kept again.
    async fn continues(&self) -> Result<()> {
        let cold = self.kept_as(None, "one").await?;
        assert_eq!((cold.n, cold.dimensions), (1, 384));
        // Its last pages may still be on their way when it is dumped again.
        let warm = self.kept_as(Some("one"), "two").await?;
        assert_eq!(
            warm,
            Embedding {
                n: 2,
                ..cold.clone()
            }
        );
        let again = self.kept_as(Some("two"), "three").await?;
        assert_eq!(
            again,
            Embedding {
                n: 3,
                ..cold.clone()
            }
        );
        // The first image was only read: a second container from it answers as the first one did.
        let other = self.kept_as(Some("one"), "four").await?;
        assert_eq!(other, Embedding { n: 2, ..cold });
        Ok(())
    }
}

#[tokio::test]
async fn a_model_server_continues_from_its_image_lazily() -> Result<()> {
    Stage::new("lazy").await?.continues().await
}

#[tokio::test]
async fn a_model_server_continues_from_its_image_eagerly() -> Result<()> {
    Stage::new("eager").await?.continues().await
}

#[tokio::test]
async fn a_model_server_does_not_start_without_its_weights() -> Result<()> {
    let stage = Stage::new("auto").await?;
    let elsewhere = model::server(&stage.node, &stage.image, "elsewhere")
        .annotation("rekindle.dev/dataset", "s3://models/not-there/");
    let (container, created) = elsewhere.try_create().await?;
    let refusal = created.err().context("it was created")?;
    assert!(
        refusal.message().contains("s3://models/not-there/"),
        "{refusal}"
    );
    container.remove().await
}
