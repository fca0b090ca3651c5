//! The SDK's client for one source: its endpoint, its certificates, its credentials, and nothing that
//! retries or checks behind the engine's back.

use std::{fs, path::Path, time::Duration};

use aws_config::{
    ecs::EcsCredentialsProvider,
    environment::{EnvironmentVariableCredentialsProvider, EnvironmentVariableRegionProvider},
    imds::credentials::ImdsCredentialsProvider,
    meta::{credentials::CredentialsProviderChain, region::RegionProviderChain},
    profile::{ProfileFileCredentialsProvider, ProfileFileRegionProvider},
    provider_config::ProviderConfig,
    web_identity_token::WebIdentityTokenCredentialsProvider,
};
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use aws_sdk_s3::{
    Client, Config,
    config::{
        BehaviorVersion, Region, RequestChecksumCalculation, ResponseChecksumValidation,
        SharedHttpClient, StalledStreamProtectionConfig, retry::RetryConfig,
        timeout::TimeoutConfig,
    },
};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use rekindle_core::config::Source;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use crate::DatasetError;

/// A connection that takes longer does not come: retransmits of SYN alone are 1 s and 3 s.
const CONNECT: Duration = Duration::from_secs(5);

pub(super) async fn new(source: &Source, connections: usize) -> Result<Client, DatasetError> {
    let http = http_client(source, connections)?;
    let region = region(source).await;
    let path_style = source.path_style.unwrap_or(source.endpoint.is_some());
    let mut config = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .http_client(http.clone())
        .region(region.clone())
        .force_path_style(path_style)
        .retry_config(RetryConfig::disabled())
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT).build())
        // Upload trailers and checks of whole objects break some stores and do nothing for ranges.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if let Some(endpoint) = &source.endpoint {
        config = config.endpoint_url(endpoint);
    }
    if source.anonymous {
        config = config.allow_no_auth();
    } else {
        config = config.credentials_provider(credentials(source, http, region)?);
    }
    Ok(Client::from_conf(config.build()))
}

/// The source's region, else what the environment or the profile says. Never the metadata service: off
/// AWS it only stalls.
async fn region(source: &Source) -> Region {
    if let Some(region) = &source.region {
        return Region::new(region.clone());
    }
    let mut profile = ProfileFileRegionProvider::builder();
    if let Some(name) = &source.profile {
        profile = profile.profile_name(name);
    }
    RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(profile.build())
        .region()
        .await
        .unwrap_or_else(|| Region::from_static("us-east-1"))
}

/// The SDK's own chain in its own order, with the metadata service only where the source asks for it,
/// or the source's credentials file alone.
fn credentials(
    source: &Source,
    http: SharedHttpClient,
    region: Region,
) -> Result<CredentialsProviderChain, DatasetError> {
    let common = ProviderConfig::without_region()
        .with_http_client(http)
        .with_region(Some(region));
    let mut profile = ProfileFileCredentialsProvider::builder().configure(&common);
    if let Some(name) = &source.profile {
        profile = profile.profile_name(name);
    }
    if let Some(path) = &source.credentials_file {
        // The SDK takes a missing file for an empty one and then says only "no credentials".
        fs::File::open(path).map_err(|e| unusable(source, path, e))?;
        let files = EnvConfigFiles::builder()
            .with_file(EnvConfigFileKind::Credentials, path)
            .build();
        let provider = profile.profile_files(files).build();
        return Ok(CredentialsProviderChain::first_try(
            "CredentialsFile",
            provider,
        ));
    }
    let chain = CredentialsProviderChain::first_try(
        "Environment",
        EnvironmentVariableCredentialsProvider::new(),
    )
    .or_else("Profile", profile.build())
    .or_else(
        "WebIdentityToken",
        WebIdentityTokenCredentialsProvider::builder()
            .configure(&common)
            .build(),
    )
    .or_else(
        "EcsContainer",
        EcsCredentialsProvider::builder().configure(&common).build(),
    );
    Ok(if source.instance_metadata {
        let imds = ImdsCredentialsProvider::builder().configure(&common);
        chain.or_else("Ec2InstanceMetadata", imds.build())
    } else {
        chain
    })
}

fn http_client(source: &Source, connections: usize) -> Result<SharedHttpClient, DatasetError> {
    // The client asserts that the system has certificates; on a bare node with a CA file it has none.
    let native = !rustls_native_certs::load_native_certs().certs.is_empty();
    let mut trust = TrustStore::empty().with_native_roots(native);
    if let Some(path) = &source.ca_file {
        trust.add_pem_certificate(authorities(source, path)?);
    }
    let tls = TlsContext::builder()
        .with_trust_store(trust)
        .build()
        .map_err(|e| DatasetError::Source {
            allow: source.allow.clone(),
            reason: e.to_string(),
        })?;
    Ok(Builder::new()
        .pool_max_idle_per_host(connections)
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .tls_context(tls)
        .build_https())
}

/// The source's CA file, checked: the client panics over one that it cannot read.
fn authorities(source: &Source, path: &Path) -> Result<Vec<u8>, DatasetError> {
    let pem = fs::read(path).map_err(|e| unusable(source, path, e))?;
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(&pem) {
        let cert = cert.map_err(|e| unusable(source, path, e))?;
        roots.add(cert).map_err(|e| unusable(source, path, e))?;
    }
    if roots.is_empty() {
        return Err(unusable(source, path, "there is no certificate in it"));
    }
    Ok(pem)
}

fn unusable(source: &Source, path: &Path, reason: impl ToString) -> DatasetError {
    DatasetError::Source {
        allow: source.allow.clone(),
        reason: format!("{}: {}", path.display(), reason.to_string()),
    }
}
