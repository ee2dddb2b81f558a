package cli

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

const ruleFile = "../deploy/helm/tacit/rules/tacit.yaml"

// Prometheus' own program says that the alerts fire when they have to, and only then.
func TestAlerts(t *testing.T) {
	if _, err := exec.LookPath("promtool"); err != nil {
		t.Skip("promtool is missing: make packages (Debian's package prometheus)")
	}
	rules, err := filepath.Abs(ruleFile)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join("testdata", "alerts.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	test := filepath.Join(t.TempDir(), "alerts.yaml")
	if err := os.WriteFile(test, []byte(strings.ReplaceAll(string(text), "[RULES]", "["+rules+"]")), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check", "rules", rules}, {"test", "rules", test}} {
		if out, err := exec.CommandContext(t.Context(), "promtool", args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %q: %v\n%s", args, err, out)
		}
	}
}

// The chart has the rules as they stand in their file, and each metric in them is one of ours.
func TestAlertsAreAboutOurMetrics(t *testing.T) {
	text, err := os.ReadFile(ruleFile)
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]any
	if err := yaml.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	rule := objects(t, "monitoring.rules.enabled=true")["PrometheusRule tacit"]
	groups, _, _ := unstructured.NestedSlice(rule.Object, "spec", "groups")
	rules := groups[0].(map[string]any)["rules"].([]any)
	if got := want["groups"].([]any)[0].(map[string]any)["rules"].([]any); len(rules) == 0 || len(got) != len(rules) {
		t.Errorf("the chart has %d rules, the file %d", len(rules), len(got))
	}
	source := sourceText(t)
	metric := regexp.MustCompile(`\btacit_[a-z_]+`)
	for _, r := range rules {
		r := r.(map[string]any)
		names := metric.FindAllString(r["expr"].(string), -1)
		if len(names) == 0 {
			t.Errorf("%v is about no metric of ours", r["alert"])
		}
		for _, name := range slices.Compact(names) {
			if !strings.Contains(source, `"`+name+`"`) {
				t.Errorf("%v: there is no metric %s", r["alert"], name)
			}
		}
		if meta, _ := r["annotations"].(map[string]any); meta["summary"] == nil || meta["description"] == nil {
			t.Errorf("%v says neither what is wrong nor what to do", r["alert"])
		}
	}
}

// sourceText is all of the programs' source.
func sourceText(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, folder := range []string{"admin", "cmd", "control", "node", "wire"} {
		err := filepath.WalkDir(filepath.Join("..", folder), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			b.Write(text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}
