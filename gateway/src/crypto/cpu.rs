//! The CPU features that decide which provider is worth having.

use std::fmt;

/// What this CPU, under this kernel, offers. VAES and VPCLMULQDQ are apart: there are CPUs with one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuFeatures(Vec<(&'static str, bool)>);

impl CpuFeatures {
    /// Asks the CPU.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        return Self(vec![
            ("aes", is_x86_feature_detected!("aes")),
            ("pclmulqdq", is_x86_feature_detected!("pclmulqdq")),
            ("avx2", is_x86_feature_detected!("avx2")),
            ("sha", is_x86_feature_detected!("sha")),
            ("vaes", is_x86_feature_detected!("vaes")),
            ("vpclmulqdq", is_x86_feature_detected!("vpclmulqdq")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512dq", is_x86_feature_detected!("avx512dq")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ]);
        #[cfg(target_arch = "aarch64")]
        return Self(vec![
            ("neon", std::arch::is_aarch64_feature_detected!("neon")),
            ("aes", std::arch::is_aarch64_feature_detected!("aes")),
            ("pmull", std::arch::is_aarch64_feature_detected!("pmull")),
            ("sha2", std::arch::is_aarch64_feature_detected!("sha2")),
            ("sha3", std::arch::is_aarch64_feature_detected!("sha3")),
        ]);
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        Self(Vec::new())
    }

    /// Whether the CPU has the feature; false for names that its architecture does not know.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(n, present)| *n == name && *present)
    }

    /// Whether AES-GCM can run on 512-bit registers.
    pub fn has_wide_gcm(&self) -> bool {
        let needed = [
            "vaes",
            "vpclmulqdq",
            "avx512f",
            "avx512dq",
            "avx512bw",
            "avx512vl",
        ];
        needed.iter().all(|f| self.has(f))
    }
}

impl fmt::Display for CpuFeatures {
    /// The features present.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sep = "";
        for (name, _) in self.0.iter().filter(|(_, present)| *present) {
            write!(f, "{sep}{name}")?;
            sep = " ";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_gcm_needs_vaes_and_vpclmulqdq_both() {
        let all = |without: &str| {
            let names = [
                "vaes",
                "vpclmulqdq",
                "avx512f",
                "avx512dq",
                "avx512bw",
                "avx512vl",
            ];
            CpuFeatures(names.map(|n| (n, n != without)).to_vec())
        };
        assert!(all("").has_wide_gcm());
        for f in ["vaes", "vpclmulqdq", "avx512f", "avx512vl"] {
            assert!(!all(f).has_wide_gcm(), "{f}");
        }
        assert_eq!(
            all("vaes").to_string(),
            "vpclmulqdq avx512f avx512dq avx512bw avx512vl"
        );
    }
}
