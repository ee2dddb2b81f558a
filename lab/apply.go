package lab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"
)

// document is one object of a YAML file.
type document struct {
	text []byte
	metav1.TypeMeta
	Metadata metav1.ObjectMeta `json:"metadata"`
}

// readDocuments reads the objects of a file; "-" is standard input.
func (call verbCall) readDocuments(name string) ([]document, error) {
	var text []byte
	var err error
	if name == "-" {
		text, err = io.ReadAll(call.stdin)
	} else {
		if !filepath.IsAbs(name) {
			name = filepath.Join(call.dir, name)
		}
		text, err = os.ReadFile(name)
	}
	if err != nil {
		return nil, err
	}
	var out []document
	for part := range bytes.SplitSeq(append([]byte("\n"), text...), []byte("\n---")) {
		d := document{text: part}
		if err := yaml.Unmarshal(part, &d); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if d.Kind == "" && len(bytes.TrimSpace(part)) == 0 {
			continue
		}
		if d.Kind == "" || d.Metadata.Name == "" {
			return nil, fmt.Errorf("%s: an object without kind or metadata.name", name)
		}
		out = append(out, d)
	}
	return out, nil
}

func doApply(ctx context.Context, c *Cluster, call verbCall) error {
	if err := errors.Join(call.want(1, -1), call.done()); err != nil {
		return err
	}
	for _, name := range call.words {
		docs, err := call.readDocuments(name)
		if err != nil {
			return err
		}
		for _, d := range docs {
			if err := c.apply(d); err != nil {
				return fmt.Errorf("apply %s %s of %s: %w", d.Kind, d.Metadata.Name, name, err)
			}
		}
	}
	return c.converge(ctx)
}

// apply writes one object. Services get their addresses; pods and slices are the
// lab's own, since there is nobody else to run them.
func (c *Cluster) apply(d document) error {
	switch d.Kind {
	case "Namespace":
		return c.labelNamespace(d.Metadata.Name, func(map[string]string) map[string]string {
			return addLabels(map[string]string{"kubernetes.io/metadata.name": d.Metadata.Name}, d.Metadata.Labels)
		})
	case "ServiceAccount":
		return c.ensureAccount(cmp.Or(d.Metadata.Namespace, "default"), d.Metadata.Name)
	case "Service":
		var s corev1.Service
		if err := yaml.UnmarshalStrict(d.text, &s); err != nil {
			return err
		}
		return c.putService(&s)
	case "Pod":
		// One with a status is an object alone, as somebody may write it.
		if !bytes.Contains(d.text, []byte("\nstatus:")) {
			return errors.New("the lab starts pods itself: use the verb pod")
		}
	}
	var object map[string]any
	if err := yaml.Unmarshal(d.text, &object); err != nil {
		return err
	}
	return c.objects.put(d.Kind, d.Metadata.Namespace, d.Metadata.Name, object)
}

func addLabels(to, from map[string]string) map[string]string {
	for k, v := range from {
		to[k] = v
	}
	return to
}

// putService gives a service its virtual addresses, as the API server would, and
// writes it. The caller converges.
func (c *Cluster) putService(s *corev1.Service) error {
	s.Namespace = cmp.Or(s.Namespace, "default")
	if err := c.ensureAccount(s.Namespace, ""); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	key := s.Namespace + "/" + s.Name
	if had := c.services[key]; had != nil {
		s.Spec.ClusterIP, s.Spec.ClusterIPs, s.Spec.IPFamilies = had.Spec.ClusterIP, had.Spec.ClusterIPs, had.Spec.IPFamilies
	} else {
		c.allocateLocked(s)
	}
	c.services[key] = s
	return c.objects.put("Service", s.Namespace, s.Name, s)
}

// allocateLocked gives both families unless the service asks for less.
func (c *Cluster) allocateLocked(s *corev1.Service) {
	if len(s.Spec.IPFamilies) == 0 {
		s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	}
	if s.Spec.ClusterIP == corev1.ClusterIPNone {
		s.Spec.ClusterIPs = []string{corev1.ClusterIPNone}
		return
	}
	c.virtuals++
	a := clusterAddress(c.virtuals)
	s.Spec.ClusterIPs = nil
	for _, f := range s.Spec.IPFamilies {
		if f == corev1.IPv6Protocol {
			s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, a.v6.String())
		} else {
			s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, a.v4.String())
		}
	}
	s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
}

func doService(ctx context.Context, c *Cluster, call verbCall) error {
	selected, address := call.takeAll("select"), call.take("address", "")
	if err := errors.Join(call.want(2, -1), call.done()); err != nil {
		return err
	}
	namespace, name, _ := strings.Cut(podKey(call.words[0]), "/")
	s := &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": name}},
	}
	if len(selected) > 0 {
		s.Spec.Selector = keyValues(selected)
	}
	switch address {
	case "none":
		s.Spec.ClusterIP = corev1.ClusterIPNone
	case "v4":
		s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol}
	case "v6":
		s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv6Protocol}
	}
	for _, w := range call.words[1:] {
		p, err := servicePort(w)
		if err != nil {
			return err
		}
		s.Spec.Ports = append(s.Spec.Ports, p)
	}
	return errors.Join(c.putService(s), c.converge(ctx))
}

// servicePort reads [NAME@]PORT[:TARGET].
func servicePort(text string) (p corev1.ServicePort, err error) {
	name, rest, ok := strings.Cut(text, "@")
	if !ok {
		name, rest = "", text
	}
	port, target, _ := strings.Cut(rest, ":")
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return p, fmt.Errorf("port %q: %w", text, err)
	}
	p = corev1.ServicePort{Name: cmp.Or(name, "p"+port), Port: int32(n), Protocol: corev1.ProtocolTCP}
	p.TargetPort = intstr.Parse(cmp.Or(target, port))
	return p, nil
}

func doDelete(ctx context.Context, c *Cluster, call verbCall) error {
	grace, err := time.ParseDuration(call.take("grace", "0s"))
	if err = errors.Join(err, call.want(1, 2), call.done()); err != nil {
		return err
	}
	if len(call.words) == 2 {
		return c.delete(ctx, call.words[0], call.words[1], grace)
	}
	docs, err := call.readDocuments(call.words[0])
	if err != nil {
		return err
	}
	for _, d := range docs {
		name := d.Metadata.Name
		if d.Metadata.Namespace != "" {
			name = d.Metadata.Namespace + "/" + name
		}
		if err := c.delete(ctx, d.Kind, name, grace); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) delete(ctx context.Context, kind, name string, grace time.Duration) error {
	switch kind = strings.ToLower(kind); kind {
	case "pod":
		p, err := c.pod(name)
		if err != nil {
			return err
		}
		return c.deletePod(ctx, p, grace)
	case "service":
		c.mu.Lock()
		delete(c.services, podKey(name))
		c.mu.Unlock()
	case "namespace":
		return errors.New("delete what is in it; an empty namespace does no harm")
	}
	namespace, base, ok := strings.Cut(name, "/")
	if !ok {
		namespace, base = "", name
		if kind == "service" {
			namespace = "default"
		}
	}
	return errors.Join(c.objects.remove(kind, namespace, base), c.converge(ctx))
}
