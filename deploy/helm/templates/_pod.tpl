{{/* What server and worker pods share: who they run as, and what is mounted. Give it (list . "server" .Values.server). */}}
{{- define "instructloop.podSettings" -}}
{{- $root := index . 0 -}}
{{- $own := index . 2 -}}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $own.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: state
    persistentVolumeClaim:
      claimName: {{ $root.Values.state.existingClaim | default (printf "%s-state" (include "instructloop.name" $root)) }}
  - name: settings
    configMap:
      name: {{ include "instructloop.name" $root }}-settings
  - name: scratch
    emptyDir: {}
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {{ $root.Values.server.sharedMemory }}
{{- end -}}

{{/* What server and worker containers share. Give it (list . (dict "NAME" "value")), the latter for its environment. */}}
{{- define "instructloop.containerSettings" -}}
{{- with first . -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
env:
  - name: INSTRUCTLOOP_STATE
    value: /state
  - name: INSTRUCTLOOP_SETTINGS
    value: /etc/instructloop/instructloop.toml
  - name: INSTRUCTLOOP_REDIS_URL
    valueFrom:
      secretKeyRef:
        name: {{ .Values.redis.existingSecret }}
        key: {{ .Values.redis.key }}
{{- end }}
{{- range $name, $value := last . }}
  - name: {{ $name }}
    value: {{ $value | quote }}
{{- end }}
volumeMounts:
  - name: state
    mountPath: /state
  - name: settings
    mountPath: /etc/instructloop
    readOnly: true
  - name: scratch
    mountPath: /tmp
    subPath: tmp
  - name: scratch
    mountPath: /home/loop
    subPath: home
  - name: shared-memory
    mountPath: /dev/shm
{{- end -}}
