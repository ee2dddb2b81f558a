// Package rollout is about a mesh under load while things change: rollouts, scaling,
// enrollment, and the replacement of every part of Tacit itself. Its tests count
// requests that failed, and look for plaintext on the wire.
package rollout
