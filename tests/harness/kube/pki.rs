//! A certificate authority, the apiserver's certificate, and those of who asks it.

use anyhow::Result;
use base64_simd::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// By the bytes of a certificate, the name that it is of.
pub(super) type Users = Arc<Mutex<HashMap<Vec<u8>, String>>>;

/// What a cluster's certificates come from.
pub(super) struct Pki {
    issuer: Issuer<'static, KeyPair>,
    pub(super) ca_pem: String,
    pub(super) ca_der: Vec<u8>,
    pub(super) users: Users,
}

impl fmt::Debug for Pki {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pki").finish_non_exhaustive()
    }
}

/// A certificate and its key.
pub(super) struct Pair {
    pub(super) certificate_pem: String,
    pub(super) certificate_der: Vec<u8>,
    pub(super) key_pem: String,
    pub(super) key_der: Vec<u8>,
}

impl Pki {
    pub(super) fn new() -> Result<Pki> {
        let key = KeyPair::generate()?;
        let mut ca = CertificateParams::new(Vec::new())?;
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        ca.distinguished_name
            .push(DnType::CommonName, "rekindle test cluster");
        let certificate = ca.self_signed(&key)?;
        Ok(Pki {
            ca_pem: certificate.pem(),
            ca_der: certificate.der().to_vec(),
            issuer: Issuer::new(ca, key),
            users: Users::default(),
        })
    }

    /// What the apiserver shows.
    pub(super) fn server(&self) -> Result<Pair> {
        let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()])?;
        params
            .distinguished_name
            .push(DnType::CommonName, "kube-apiserver");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.signed(&params)
    }

    /// The user of a kubeconfig, by a certificate.
    pub(super) fn user(&self, name: &str, group: &str) -> Result<Value> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, name);
        params
            .distinguished_name
            .push(DnType::OrganizationName, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let pair = self.signed(&params)?;
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.insert(pair.certificate_der, name.to_owned());
        Ok(json!({
            "client-certificate-data": STANDARD.encode_to_string(pair.certificate_pem),
            "client-key-data": STANDARD.encode_to_string(pair.key_pem),
        }))
    }

    /// As a kubeconfig has it.
    pub(super) fn ca(&self) -> String {
        STANDARD.encode_to_string(&self.ca_pem)
    }

    fn signed(&self, params: &CertificateParams) -> Result<Pair> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Pair {
            certificate_pem: certificate.pem(),
            certificate_der: certificate.der().to_vec(),
            key_pem: key.serialize_pem(),
            key_der: key.serialize_der(),
        })
    }
}
